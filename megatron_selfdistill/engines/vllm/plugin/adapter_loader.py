# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Load the factors of a run's adapters into a vLLM worker, from memory and in the place of the last ones.

This module imports vLLM and never Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_ID, EngineAdapter
from megatron_selfdistill.errors import first_few


@torch.no_grad()
def load_adapter(runner: Any, tensors: Mapping[str, Tensor], adapter: EngineAdapter) -> None:
    """Replace the factors of the adapter of a worker's model runner by ``tensors``, by PEFT's names.

    vLLM keeps the tensors that lie in the host's memory, and scales B in place.
    Raises: RuntimeError for an engine without adapters, ValueError for modules that lack factors or have none in vLLM.
    """
    if getattr(runner, "lora_manager", None) is None:
        raise RuntimeError("this engine takes no adapters: it was started without enable_lora")
    manager = runner.lora_manager._adapter_manager
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)  # it renames modules, and joins them, too
    model = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        dict(tensors),
        PEFTHelper(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=list(adapter.modules),
            use_rslora=adapter.rank_stabilised,
        ),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    wanted = {part for name in manager.modules for part in manager.packed_modules.get(name, [name])}  # q for qkv
    lacking = [f"{name} got no factors" for name in sorted(wanted - model.loras.keys())]
    lacking += [f"{name} takes none" for name in sorted(model.loras.keys() - wanted)]
    lacking += [
        f"{name} got one factor" for name, lora in model.loras.items() if lora.lora_a is None or lora.lora_b is None
    ]
    if lacking:
        raise ValueError(f"the adapters do not fit vLLM's model: {first_few(lacking)}")
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(model)
    manager.activate_adapter(ADAPTER_ID)
