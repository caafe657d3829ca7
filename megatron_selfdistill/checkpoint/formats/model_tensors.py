# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tensors of a checkpoint that belong to the model, and the checks that they fit and are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.errors import CheckpointError, first_few

PASSTHROUGH = "hf_passthrough."
"""The prefix of the keys of tensors that Megatron neither builds nor trains.

A checkpoint keeps such tensors for the conversion to Hugging Face.
"""

NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "teacher.")
"""The prefixes of keys in a checkpoint that do not belong to the model."""

NOT_BUILT = ("mtp.", PASSTHROUGH)
"""The prefixes of multi-token-prediction layers, which some checkpoints have and no model of this program has."""


def weight_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return those of the ``shapes`` of a torch_dist checkpoint, by key, that belong to the model."""
    return {key: shape for key, shape in shapes.items() if not key.startswith(NOT_WEIGHTS)}


def raise_misfit(path: Path, faults: Sequence[str]) -> None:
    """Raise CheckpointError with the first of ``faults``, the differences to the model, if there are any."""
    if faults:
        raise CheckpointError(f"{path} does not fit this model: {first_few(faults)}")


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; wait for the device once.

    The function makes one pass without a temporary tensor: NaN propagates through the minimum and the maximum, and an
    infinity is the minimum or the maximum.
    """
    named = [(name, tensor) for name, tensor in named if tensor.numel() and tensor.is_floating_point()]
    if not named:
        return []
    bounds = torch.stack([torch.stack(torch.aminmax(tensor.detach())).double() for _, tensor in named])
    return [name for (name, _), finite in zip(named, bounds.isfinite().all(1).tolist(), strict=True) if not finite]
