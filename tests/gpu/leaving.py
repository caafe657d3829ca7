# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The end of one of several layouts or runs in the same process."""

from __future__ import annotations

import gc
import sys


def leave(synchronize: bool) -> None:
    """Destroy the process group and Megatron's state, after a barrier if ``synchronize``."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        if synchronize:
            dist.barrier()
        _clear_megatron_state()
        dist.destroy_process_group()
    else:
        _clear_megatron_state()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    gc.collect()


def _clear_megatron_state() -> None:
    """Restore what the import had set: groups, microbatch calculator, random streams, auxiliary scales."""
    modules = sys.modules
    if "megatron.core.parallel_state" not in modules:
        return
    modules["megatron.core.parallel_state"].destroy_model_parallel()
    for name, destroy in (
        ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
        ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    ):
        if name in modules:
            getattr(modules[name], destroy)()
    if random_module := modules.get("megatron.core.tensor_parallel.random"):
        random_module._CUDA_RNG_STATE_TRACKER = None
        random_module._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    for name, scaler in (
        ("megatron.core.transformer.moe.moe_utils", "MoEAuxLossAutoScaler"),
        ("megatron.core.transformer.multi_token_prediction", "MTPLossAutoScaler"),
    ):
        if name in modules and hasattr(modules[name], scaler):
            getattr(modules[name], scaler).main_loss_backward_scale = None
