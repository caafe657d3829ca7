# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Functions of users that give hints, select responses and weigh tokens; runs name them by dotted paths."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_selfdistill.data.problems import Problem


def first_right_text(problem: Problem, responses: Sequence[tuple[str, float]]) -> list[str | None]:
    right = next((text for text, reward in responses if reward >= 0.5), problem.answer)
    return [None if reward >= 0.5 else right for _, reward in responses]


def without_last_character(problem: Problem, responses: Sequence[tuple[str, float]]) -> list[str | None]:
    return [text if reward >= 0.5 else text[:-1] or None for text, reward in responses]


def skill_of(problem: Problem, response_text: str, reward: float) -> str | None:
    """Return a skill that depends on the response, in characters of the tiny tokenizer."""
    return f"{len(response_text)}:{response_text[:3]}" if reward >= 0.5 else None


def hint_of(problem: Problem, response_text: str, next_state: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the next message's text where it is no thanks, with the reply's first digits."""
    text = str(next_state[0]["content"])
    return None if text == "thanks" else f"{text}:{response_text[:3]}"


def reward_of_reply(response_text: str, problem: Problem) -> float:
    assert problem.reply is not None
    return 1.0 if problem.reply.next_state[0]["content"] == "thanks" else -1.0


_CALLS = 0


def reward_that_leaves_late(response_text: str, problem: Problem) -> float:
    """Return 1 for the first twenty responses of a process, and then try to end the program."""
    global _CALLS
    _CALLS += 1
    if _CALLS > 20:
        sys.exit(0)
    return 1.0


def published_weights(signals: Any) -> Any:
    """Return the weights of PW-OPSD at its published constants, written anew."""
    import torch

    places = [(i + 0.5) / n for n in signals.lengths.tolist() for i in range(n)]
    return 0.25 + 0.75 * torch.sigmoid((torch.tensor(places, dtype=torch.float64) - 0.3) / 0.1)


def doubts(signals: Any) -> Any:
    """Return the sum of what a pass has measured of each token's distributions: two entropies and the divergence."""
    return signals.student_entropy + signals.target_entropy + signals.divergence
