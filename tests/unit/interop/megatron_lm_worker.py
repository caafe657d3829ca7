# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One rank of Megatron-LM itself, on the CPU; test_megatron_lm.py starts it with RANK, WORLD_SIZE and so on set.

    megatron_lm_worker.py MEGATRON_LM WHAT OUT [flags of pretrain_gpt.py ...]

``pretrain_gpt.py`` comes from the directory MEGATRON_LM and runs as it is.  So do ``megatron.training`` and
``gpt_builders.py``, except that the wheel of Megatron Core brings ``megatron.training`` since 0.19.  The process
provides only what the machine lacks: CUDA's names (`megatron_selfdistill.compat.cpu`), the repairs of Megatron Core
without Transformer Engine, its FusedAdam, compiled extensions, and the package ``six``, which a BERT tokenizer imports.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from held_state import held

from megatron_selfdistill.compat import cpu, older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)


def expose(megatron_lm: Path) -> None:
    """Make Megatron-LM importable, and let it believe in a CUDA device."""
    sys.path.append(str(megatron_lm))
    sys.modules.setdefault("six", types.ModuleType("six"))
    torch.cuda.is_available = lambda: True  # after `cpu.install` has replaced what is behind the name
    torch.accelerator.is_available = lambda: False  # else Adam asks the driver for its stream
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0, name="none")
    from megatron.core.datasets import utils

    if older_megatron.version() < (0, 19):
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None  # it compiles CUDA kernels of the older models
    utils.compile_helpers = lambda: None  # the wheel of Megatron Core has them compiled, and no makefile


def name_layers_as_transformer_engine_does() -> None:
    """Let Megatron-LM's local layer spec use the keys of Transformer Engine's, which no CPU runs."""
    from megatron.core.models.gpt import gpt_layer_specs

    local_spec = gpt_layer_specs.get_gpt_layer_local_spec

    def named_spec(*args: Any, **kwargs: Any) -> Any:
        spec = local_spec(*args, **kwargs)
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if not hasattr(older_megatron.submodules_of(spec.submodules.mlp), "experts"):
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        spec.submodules.sharded_state_dict_keys_map = keys
        return spec

    gpt_layer_specs.get_gpt_layer_local_spec = named_spec


def load_into_torch_adam() -> None:
    """Let Megatron's distributed optimizer load its state into torch's AdamW, which stands in for FusedAdam.

    Megatron's code fits the state of FusedAdam alone, which has no ``step`` and exists when a checkpoint is described.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    sharded_state_dict, load_state_dict = Optimizer.sharded_state_dict, Optimizer.load_state_dict

    def with_state(self: Any, model: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model, is_loading=is_loading, **kwargs)

    @torch.no_grad()
    def copy_without_step(self: Any, model_param: Any, tensors: Any) -> None:
        group, place = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group]["params"][place]
        for key, value in {"param": param, **self.optimizer.state[param]}.items():
            if key in tensors and key != "step":
                value.copy_(tensors[key])

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()  # Megatron gives all parameters one tensor, which each increments

    Optimizer.sharded_state_dict, Optimizer.load_state_dict = with_state, with_own_steps
    Optimizer._set_main_param_and_optimizer_states = copy_without_step


def build() -> tuple[Any, Any, Any]:
    """Return model chunks, optimizer and scheduler as ``pretrain`` builds them; the checkpoint of --load is in them."""
    from megatron.core.enums import ModelType
    from megatron.training import arguments
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    if older_megatron.version() < (0, 19):
        from gpt_builders import gpt_builder
        from model_provider import model_provider

        initialize_megatron()
        return setup_model_and_optimizer(partial(model_provider, gpt_builder), ModelType.encoder_or_decoder)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    args = arguments.parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return setup_model_and_optimizer(ModelType.encoder_or_decoder, cfg_container=config, pg_collection=groups)


def state() -> dict[str, Any]:
    """Return what Megatron-LM holds after it loaded a run's checkpoint."""
    import random

    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.training import get_args

    chunks, optimizer, scheduler = build()
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return held(chunks, optimizer) | {
        "iteration": get_args().iteration,
        "scheduler_steps": scheduler.num_steps,
        "drawn": [random.random(), float(np.random.random()), torch.rand(()).item(), tracked],
    }


def pretrain() -> dict[str, Any]:
    """Run ``pretrain_gpt.py``; return what it holds at its end."""
    from megatron.training import training

    setup, made = training.setup_model_and_optimizer, []

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(setup(*args, **kwargs))
        return made[0]

    training.setup_model_and_optimizer = kept
    runpy.run_path(sys.argv[0], run_name="__main__")
    chunks, optimizer, _ = made[0]
    return held(chunks, optimizer)


def main() -> None:
    megatron_lm, what, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    expose(megatron_lm)
    name_layers_as_transformer_engine_does()
    load_into_torch_adam()
    sys.argv = [str(megatron_lm / "pretrain_gpt.py"), *sys.argv[4:]]
    result = {"state": state, "pretrain": pretrain}[what]()
    if os.environ["RANK"] == "0":
        torch.save(result, out)


if __name__ == "__main__":
    main()
