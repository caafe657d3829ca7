# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The user's functions of a problem and all responses to it, which give each response a text or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.records import NO_TEXT, is_text
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.rollout.base import response_text
from megatron_selfdistill.sources.problem_prompts import Answer

GroupFunction = Callable[[Problem, Sequence[tuple[str, float]]], Sequence[str | None]]
"""A function ``function(problem, responses)`` of a problem and of the text and the reward of each response to it.

The result holds one text or None for each response, in their order.  Equal arguments must give equal results.
"""

HintFunction = GroupFunction
"""A `GroupFunction` (``data.solutions``) that returns what the teacher of each response sees; None is no hint."""

SelectFunction = GroupFunction
"""A `GroupFunction` (``rollout.select``) that returns the text to train on in place of each response; None drops it."""


def of_groups(
    function: GroupFunction,
    name: str,
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    grid: RankGrid,
    *,
    keeps_texts: str | None = None,
) -> list[str | None]:
    """Return the text that ``function`` gives to each of this replica's answers, equal on all ranks of the replica.

    The function sees every response without its stop token and without special tokens, also a truncated response.  The
    ranks share the groups, so that no group is judged twice.  ``name``: what messages call the function.
    ``keeps_texts``: the reason why a text must be that of its response; None allows other texts.
    Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function failed,
    or returned anything but one text or None for each response.
    """
    texts = [response_text(answer.response, tokenizer) for answer in answers]
    groups: dict[int, list[int]] = {}
    for i, answer in enumerate(answers):
        groups.setdefault(answer.group, []).append(i)
    questions = [
        (answers[members[0]].problem, [(texts[i], answers[i].reward or 0.0) for i in members])
        for members in groups.values()
    ]

    def checked(problem: Problem, responses: list[tuple[str, float]]) -> list[str | None]:
        found = function(problem, list(responses))
        _check(found, responses, keeps_texts)
        return list(found)

    judged = judged_in_order(questions, checked, grid, name)
    results: list[str | None] = [None] * len(answers)
    for members, found in zip(groups.values(), judged, strict=True):
        for i, text in zip(members, found, strict=True):
            results[i] = text
    return results


def _check(found: object, responses: Sequence[tuple[str, float]], keeps_texts: str | None) -> None:
    expected = f"expected one text or None for each of {len(responses)} responses"
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{expected}, got a value of type {type(found).__name__}")
    strange = [item for item in found if item is not None and not isinstance(item, str)]
    if strange:
        raise ValueError(f"{expected}, got a value of type {type(strange[0]).__name__}")
    if not is_text(found):
        raise ValueError(NO_TEXT)
    if len(found) != len(responses):
        raise ValueError(f"{expected}, got {len(found)}")
    edited = any(item not in (None, text) for item, (text, _) in zip(found, responses, strict=True))
    if keeps_texts is not None and edited:
        raise ValueError(f"expected each text as it is or None, since {keeps_texts}, got an edited text")
