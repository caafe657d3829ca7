# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names of the collectives that a rank calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

GATHER, REDUCE_SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if hasattr(dist, "all_gather_single")
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv"))
    and callable(getattr(dist, name))
]


@contextmanager
def called_collectives() -> Iterator[list[str]]:
    """Give a list to which every call of a collective in the block adds its name."""
    called: list[str] = []

    def counted(name: str, original: Any) -> Any:
        return lambda *args, **kwargs: (called.append(name), original(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        yield called
