# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A task of the examples: what the base model reads in pretraining, and the problems that it then trains on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
"""One line of the JSONL that ``data.path`` names."""


@dataclass(frozen=True)
class Task:
    """A task whose base model makes mistakes without a hint, and fewer mistakes with one.

    ``evaluation.verifier`` names the function that judges a response, because a run reads that function by its path.
    """

    name: str
    alphabet: str
    """The characters of all texts, one token each; the last two are the end of a text and the padding."""
    corpus_row: Callable[[random.Random], tuple[str, str, str]]
    """Returns a random row (prompt, input text, target text) of the pretraining corpus."""
    training_problems: Callable[[int], list[Record]]
    """Returns the problems that a run with a seed trains on."""
    held_out_problems: Callable[[], list[Record]]
    """Returns the problems on which a model is measured, the same for every seed."""
    shows_work: Callable[[str], bool]
    """Returns whether a response shows how it found its answer."""
    overrides: tuple[str, ...] = ()
    """Overrides of configs/quickstart.yaml that every run on this task needs."""
    environment: tuple[str, ...] = ()
    """Overrides with the environment of the task, which pretraining lacks; empty where a response is an episode."""
    pretraining: tuple[str, ...] = ()
    """Overrides of `pretraining.OVERRIDES`."""
    pretraining_steps: int = 1500
