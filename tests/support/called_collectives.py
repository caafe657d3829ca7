# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names of the collectives that a rank calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, _counted(name, called))
        yield called


def _counted(name: str, called: list[str]) -> Callable[..., Any]:
    original = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return original(*args, **kwargs)

    return counted
