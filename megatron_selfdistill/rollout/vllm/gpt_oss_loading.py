# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Let vLLM replace the weights of a GPT-OSS model in place.

vLLM's layerwise reload counts the weights that pass through the loaders of the parameters.  Its GPT-OSS model copies
the tensors of all experts and the attention sinks past these loaders, so that an update would leave them as they were.
The experts one by one, and the sinks, pass through the loaders here.  This module imports vLLM and never Megatron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank

_EXPERTS, _SINKS = ".mlp.experts", ".self_attn.sinks"


def load_through_loaders(model: torch.nn.Module) -> None:
    """Replace ``model.load_weights`` of a GPT-OSS model; do nothing for other models and for a second call.

    Attention implementations may keep a copy of the sinks in another dtype; they make it again from the parameter when
    vLLM ends the reload.
    """
    if type(model).__name__ != "GptOssForCausalLM":
        return
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "sinks") and hasattr(getattr(module, "attn", None), "impl"):
            module.attn.impl.sinks = module.sinks
    if "load_weights" in model.__dict__:
        return
    loads: Any = model.load_weights

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = set()
        loaded |= loads(_one_by_one(model, weights, loaded))
        return loaded

    model.__dict__["load_weights"] = load_weights


def _one_by_one(
    model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]], loaded: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``weights`` with each expert on its own; load the sinks, and add their names to ``loaded``."""
    for name, tensor in weights:
        module, _, last = name.rpartition(".")
        if name.endswith(_SINKS):
            own = name.replace(".self_attn.", ".attn.")
            param: Any = model.get_parameter(own)
            heads = param.shape[0]
            param.weight_loader(param, tensor.narrow(0, get_tensor_model_parallel_rank() * heads, heads))
            loaded.add(own)
        elif module.endswith(_EXPERTS):
            for expert in range(tensor.shape[0]):
                yield f"{module}.{expert}.{last}", tensor[expert]
        else:
            yield name, tensor
