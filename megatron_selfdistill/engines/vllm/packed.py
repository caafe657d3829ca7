# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pack the weights that vLLM keeps packed on a CPU and does not pack again when weights are replaced in place.

    before_reload(model)
    ...  # vLLM's reload_weights, or the steps of its layerwise reload
    after_reload(model)

On other devices nothing is packed: layers compute with the parameters themselves.  This module imports vLLM and never
Megatron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform

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


_weight_loader = layerwise._get_weight_loader


def _named_weight_loader(tensor: Tensor) -> Any:
    """Return the loader of a parameter as vLLM's own function does, with a name.

    vLLM reads the name, which the loaders of MiniMax-M2's norms lack: they are ``functools.partial`` objects.
    """
    loader = _weight_loader(tensor)
    if not hasattr(loader, "__name__"):
        loader.__name__ = type(loader).__name__
    return loader


def _materialize_in_place(layer: torch.nn.Module, info: Any) -> None:
    """Give the parameters of ``layer`` memory to be loaded into, as vLLM's own function does."""
    if info.kernel_tensors is not None:
        parameters, _ = info.kernel_tensors
        for name, wanted in get_layer_tensors(layer).items():
            held = parameters.get(name)
            like = held is not None and (held.shape, held.stride(), held.dtype)
            if wanted.is_meta and like == (wanted.shape, wanted.stride(), wanted.dtype):
                tensor = held.data
                tensor.__class__ = wanted.__class__  # with the loaders of the parameter that vLLM has recorded
                tensor.__dict__ = wanted.__dict__.copy()
                setattr(layer, name, tensor)
    materialize_layer(layer, info)  # what is still without memory


def before_reload(model: torch.nn.Module) -> None:
    """Let experts be packed as at their first load, and let vLLM load into the memory that layers have.

    An expert layer that has a kernel counts as ready, so that vLLM would read plain weights as packed ones.  On every
    device, this and every later reload of the process load into the memory that the layers have.
    """
    layerwise.materialize_layer = _materialize_in_place
    layerwise._get_weight_loader = _named_weight_loader
    load_through_loaders(model)
    if current_platform.is_cpu():
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None


def after_reload(model: torch.nn.Module) -> None:
    """Pack the output layer of a model with tied embeddings.

    Its weights arrive under the embedding's name, so that vLLM counts the layer as not loaded and would use the weights
    of the start for ever.
    """
    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
