# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Copy many small host tensors to a device in one asynchronous copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNMENT = 16
"""The alignment of tensors in bytes, a multiple of every element size, suitable for vectorised loads."""


def to_device_in_one_copy(tree: T, device: torch.device) -> T:
    """Return ``tree`` with every tensor replaced by its copy on ``device``.

    ``tree`` is a tensor, or dataclasses, lists, tuples and dictionaries of trees.  Its tensors are on the host and have
    any shape and dtype; other values stay unchanged.  A tensor that occurs several times is copied once and remains one
    object.

    The copies are views of one block of memory, which lives as long as one of the views.  For a CUDA device the block
    is filled in pinned memory and copied without waiting for the device: work that is queued afterwards on the current
    stream sees the copy.  On a CPU the same code runs without pinning.

    Collectives: none.
    """
    found: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor:
        found.setdefault(id(tensor), tensor)
        return tensor

    _mapped(tree, collect)
    starts, size = {}, 0
    for key, tensor in found.items():
        starts[key] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for key, tensor in found.items():
        _view(block, starts[key], tensor).copy_(tensor)
    block = block.to(device, non_blocking=True)
    views = {key: _view(block, starts[key], tensor) for key, tensor in found.items()}
    copied: T = _mapped(tree, lambda tensor: views[id(tensor)])
    return copied


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(value, function) for value in tree])
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _mapped(getattr(tree, f.name), function) for f in fields(tree) if f.init})
    return tree
