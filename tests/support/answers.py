# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Problems of which only the answer matters."""

from __future__ import annotations

from megatron_selfdistill.data.problems import Problem


def problem_with(answer: str | None) -> Problem:
    """Return a problem that asks nothing, with that answer."""
    return Problem("p", ({"role": "user", "content": "?"},), "so", answer, "file.jsonl:7")
