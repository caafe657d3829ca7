# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment of verifiers: three tries to guess the digit of a problem."""

from __future__ import annotations

from typing import Any

import verifiers
from datasets import Dataset

TRIES = 3


class Numbers(verifiers.MultiTurnEnv):
    """A game whose turns say whether the guess is right."""

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        """Judge the last guess; a right one ends the episode."""
        right = messages[-1].content.strip() == state["answer"]
        told = [{"role": "user", "content": "right" if right else "wrong"}]
        if right:
            state["final_env_response"] = told
        return told


def solved(state: Any, **_: Any) -> float:
    """Return 1 for an episode with a right guess."""
    return float(state.get("final_env_response") is not None)


def load_environment(number: int = 10) -> verifiers.Environment:
    rows = [{"question": f"Guess a digit, game {i}.", "answer": str(i % 10)} for i in range(number)]
    rubric = verifiers.Rubric(funcs=[solved])
    return Numbers(dataset=Dataset.from_list(rows), rubric=rubric, max_turns=TRIES)
