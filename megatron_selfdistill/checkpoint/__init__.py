# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checkpoints: saving and resuming runs safely against kills, other programs' formats, and conversion."""
