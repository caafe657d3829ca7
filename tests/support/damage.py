# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Damage to files, as a failing disk does it."""

from __future__ import annotations

from pathlib import Path


def flip_bit(file: Path, place: int | None = None, mask: int = 0x10) -> None:
    """Flip the bits of ``mask`` in one byte of ``file``: at ``place``, or in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= mask
    file.write_bytes(data)
