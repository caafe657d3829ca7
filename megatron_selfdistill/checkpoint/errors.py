# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What goes wrong with a checkpoint, in one sentence."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, in one sentence; on many ranks, raised on every one."""
