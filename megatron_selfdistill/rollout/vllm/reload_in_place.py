# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM's layerwise reload without its second copy of every weight.  Needs vLLM, never Megatron.

vLLM loads a layer into new memory, lets the layer's kernels rearrange it, and copies the result into the tensors that
the layer had before, whose addresses CUDA graphs hold.  Where the loaded tensor has the shape, strides and type of that
tensor, this gives vLLM the tensor's own memory to load into.  What a kernel rearranges into new memory is still copied;
what stays as it was loaded is in its place already, and vLLM's copy of a tensor onto itself does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

_weight_loader = layerwise._get_weight_loader


def reload_in_place() -> None:
    """Let every later reload of this process use the memory that a layer has; calling it again changes nothing."""
    layerwise.materialize_layer = _materialize_in_place
    layerwise._get_weight_loader = _named_weight_loader


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
            if held is not None and wanted.is_meta and _is_alike(held, wanted):
                tensor = held.data
                tensor.__class__ = wanted.__class__  # with the loaders of the parameter that vLLM has recorded
                tensor.__dict__ = wanted.__dict__.copy()
                setattr(layer, name, tensor)
    materialize_layer(layer, info)  # what is still without memory


def _is_alike(held: Tensor, wanted: Tensor) -> bool:
    return held.shape == wanted.shape and held.stride() == wanted.stride() and held.dtype == wanted.dtype
