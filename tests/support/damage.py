# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Damage to files, like that of a failing disk, and pickles that do harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip_bit(file: Path, place: int | None = None, mask: int = 0x10) -> None:
    """Flip the bits of ``mask`` in one byte of ``file``: the byte at ``place``, or the middle byte."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= mask
    file.write_bytes(data)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)
