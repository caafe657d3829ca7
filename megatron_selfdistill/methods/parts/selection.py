# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The selection among the responses of a step by a function of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.config import function_named
from megatron_selfdistill.config.schema.method_config import sampled_log_probs_key
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.records import is_text
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.rollouts import Rollout

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


GroupFunction = Callable[[Problem, Sequence[tuple[str, float]]], Sequence[str | None]]
"""A function ``function(problem, responses)`` of a problem and of the text and the reward of each response to it.

The result holds one text or None for each response, in their order.  Equal arguments must give equal results.
"""


def of_groups(
    function: GroupFunction,
    name: str,
    rollouts: Sequence[Rollout],
    tokenizer: Tokenizer,
    grid: RankGrid,
    *,
    keeps_texts: str | None = None,
) -> list[str | None]:
    """Return the text that ``function`` gives to each of this replica's rollouts, equal on all ranks of the replica.

    The function sees every response without its stop token and without special tokens, also a truncated response.  The
    ranks share the groups, so that no group is judged twice.  ``name``: what messages call the function.
    ``keeps_texts``: the reason why a text must be that of its response; None allows other texts.
    Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function failed,
    or returned anything but one text or None for each response.
    """
    contents = [(response_text(one.response, tokenizer), one.reward or 0.0) for one in rollouts]

    def checked(problem: Problem, responses: list[tuple[str, float]]) -> list[str | None]:
        found = function(problem, list(responses))
        fits = isinstance(found, (list, tuple)) and len(found) == len(responses) and is_text(found)
        if not fits or any(not isinstance(item, str | None) for item in found):
            raise ValueError(f"expected one text or None for each of {len(responses)} responses, in a list, in UTF-8")
        edited = any(item not in (None, text) for item, (text, _) in zip(found, responses, strict=True))
        if keeps_texts is not None and edited:
            raise ValueError(f"expected each text as it is or None, since {keeps_texts}, got an edited text")
        return list(found)

    return judged_groups(rollouts, contents, checked, grid, name)


def judged_groups(
    rollouts: Sequence[Rollout], contents: Sequence[Any], judge: Callable[..., Sequence[Any]], grid: RankGrid, name: str
) -> list[Any]:
    """Return what ``judge(problem, contents of a group)`` gives to each of this replica's rollouts, in their order.

    ``contents``: of each rollout what ``judge`` sees.  Collectives and errors: as for `judged_in_order`.
    """
    groups = members_of_groups(rollouts)
    questions = [(rollouts[members[0]].problem, [contents[i] for i in members]) for members in groups]
    results: list[Any] = [None] * len(rollouts)
    for members, found in zip(groups, judged_in_order(questions, judge, grid, name), strict=True):
        for i, result in zip(members, found, strict=True):
            results[i] = result
    return results


def members_of_groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Return the places of the rollouts of each group, in the order of the groups' first rollouts."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(rollouts):
        groups.setdefault(one.group, []).append(i)
    return list(groups.values())


def selected_by_function(name: str, rollouts: Sequence[Rollout], tools: MethodTools) -> list[Rollout]:
    """Return the rollouts that stay, in their order, with the texts that the function ``name`` returned.

    An edited response consists of the tokens of its text and a stop token, keeps its reward, and has no log-probs of
    the sampler; an edited response that is longer than rollout.max_new_tokens is dropped.  Where a key needs the
    sampler's log-probs, no response may be edited.
    Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function failed,
    returned anything but one text or None for each response, or edited a text that must stay.
    """
    tokenizer, key = tools.run_data.tokenizer, sampled_log_probs_key(tools.config)
    reason = None if key is None else f"{key} compares p with the probability that the sampled text had"
    function = function_named("method.select", name, {})
    texts = of_groups(function, "selection function", rollouts, tokenizer, tools.grid, keeps_texts=reason)
    kept = []
    for rollout, text in zip(rollouts, texts, strict=True):
        if text == response_text(rollout.response, tokenizer):
            kept.append(rollout)
        elif text is not None:
            token_ids = [*tokenizer.encode(text), tools.run_data.stop_token_ids[0]]
            if len(token_ids) <= tools.config.rollout.max_new_tokens:
                kept.append(replace(rollout, response=Response.unsampled(token_ids)))
    return kept
