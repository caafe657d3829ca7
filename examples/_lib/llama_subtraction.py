# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of subtraction.py for a base with the architecture of Llama, which vLLM can run too."""

from __future__ import annotations

from _lib.subtraction import *  # noqa: F403
from _lib.subtraction import hard_problems, record, verify

__all__ = ["hard_problems", "record", "verify"]

NAME = "llama_subtraction"
OVERRIDES: tuple[str, ...] = ("model=tiny_llama",)
