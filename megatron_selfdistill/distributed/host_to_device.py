# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Copy host tensors to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(tree: T, device: torch.device) -> T:
    """Return ``tree`` with every tensor replaced by its copy on ``device``.

    ``tree`` is a tensor, or dataclasses, lists, tuples and dictionaries of trees.  Its tensors are on the host and have
    any shape and dtype; other values stay unchanged.  A tensor that occurs several times is copied once and remains one
    object.  To a CUDA device the copies go through pinned memory, and the work that is queued afterwards on the current
    stream sees them.
    """
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            copies[id(tensor)] = pinned.to(device, non_blocking=True, copy=True)
        return copies[id(tensor)]

    copied: T = _mapped(tree, copy)
    return copied


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
