# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The signs by which a rank shows that it makes progress, which the watchdog reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class _Signs:
    count: int = 0
    place: int = 0
    phase: str = "start"
    moving_files: int = 0
    microbatch: tuple[int, int] = 0, 0


_signs = _Signs()


def beat(microbatch: int = 0, of: int = 0) -> None:
    """Record progress, such as a token or a response, or that microbatch number ``microbatch`` of ``of`` begins."""
    _signs.count += 1
    _signs.microbatch = microbatch, of


def microbatch() -> tuple[int, int]:
    """Return the number of the microbatch under way, and of those of its pass; 0 of 0 where there is none."""
    return _signs.microbatch


def entered(phase: str) -> None:
    """Record that a phase of a step begins.

    All ranks pass through the same phases, so a rank that is behind delays the others.
    """
    beat()
    _signs.place += 1
    _signs.phase = phase


def left(phase: str) -> None:
    """Record that the phase ends."""
    beat()
    _signs.place += 1
    _signs.phase = f"after {phase}"


@contextlib.contextmanager
def moving_files() -> Iterator[None]:
    """Count bytes that are read or written as progress, while a library that cannot call `beat` loads or saves.

    Progress is at least one MiB between two looks, by this process and the processes that it has started.
    """
    _signs.count += 1
    _signs.moving_files += 1
    try:
        yield
    finally:
        _signs.moving_files -= 1
        _signs.count += 1
