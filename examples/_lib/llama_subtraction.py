# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of subtraction.py for a base with the architecture of Llama, which vLLM can run too."""

from __future__ import annotations

from _lib.subtraction import (
    ALPHABET,
    PRETRAINING,
    PRETRAINING_STEPS,
    corpus_row,
    held_out_problems,
    shows_work,
    training_problems,
    verify,
)

__all__ = [
    "ALPHABET",
    "NAME",
    "OVERRIDES",
    "PRETRAINING",
    "PRETRAINING_STEPS",
    "corpus_row",
    "held_out_problems",
    "shows_work",
    "training_problems",
    "verify",
]

NAME = "llama_subtraction"
OVERRIDES: tuple[str, ...] = ("model=tiny_llama",)
