# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Find NaN and infinite elements of weights when they are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> Tensor:
    """Return whether all elements are finite, as a boolean scalar on the tensor's device; True for integers.

    The function makes one pass without a temporary tensor: NaN propagates through the minimum and the maximum, and an
    infinity is the minimum or the maximum.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor.detach())
    return torch.isfinite(low) & torch.isfinite(high)


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; wait for the device once."""
    names, flags = [], []
    for name, tensor in named:
        names.append(name)
        flags.append(is_finite(tensor))
    if not flags:
        return []
    return [name for name, finite in zip(names, torch.stack(flags).tolist(), strict=True) if not finite]
