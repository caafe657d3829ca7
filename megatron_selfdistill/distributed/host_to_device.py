# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Copy host tensors to a device without waiting for it."""

from __future__ import annotations

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

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                pinned = value.pin_memory() if device.type == "cuda" else value
                copies[id(value)] = pinned.to(device, non_blocking=True, copy=True)
            return copies[id(value)]
        if isinstance(value, dict):
            return {key: copied(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([copied(one) for one in value])
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: copied(getattr(value, f.name)) for f in fields(value) if f.init})
        return value

    result: T = copied(tree)
    return result
