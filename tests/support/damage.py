# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Damage to files, like the damage of a failing disk."""

from __future__ import annotations

from pathlib import Path


def flip_bit(file: Path, place: int | None = None, mask: int = 0x10) -> None:
    """Flip the bits of ``mask`` in one byte of ``file``: the byte at ``place``, or the middle byte."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= mask
    file.write_bytes(data)
