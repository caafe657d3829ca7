# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Silence warnings of Megatron Core and torch that do not help users; each rank would print a screen of them."""

from __future__ import annotations

import re
import warnings

_MESSAGES = (
    # The first lines of a run say which layers are in use.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # Megatron's use of older names of Megatron and torch.
    "full scope is deprecated",
    "`torch.distributed.",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "TypedStorage is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    # Set in distributed/ranks.py, where it matters.
    "When using async grad allreduce",
    # The converter writes checkpoints from a single process on purpose.
    "torch.distributed is disabled, unavailable or uninitialized",
)


def silence_known_warnings() -> None:
    """Silence the known warnings, in a command before it imports Megatron; other warnings stay."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=re.escape(message))
