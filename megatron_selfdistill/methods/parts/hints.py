# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints that follow the sampling: they enter the teacher's prompt once the responses of a step are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.opsd_rl import OpsdRl
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.method import MethodTools
from megatron_selfdistill.sources.rollouts import Rollout, without_hint


class HintedLater(OpsdRl):
    """The base of methods whose teacher sees a hint only once the responses are sampled.

    A response without a hint, or whose hint does not fit into the teacher's prompt, has no teacher.
    """

    def prompts(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered; the teacher's prompt is the student's."""
        return without_hint(self.tools.given.pair(problem))

    def has_solution(self, problem: Problem) -> bool:
        """Return False: the teacher sees no hint before the responses are sampled."""
        return False


def chosen_with_hints(
    rollouts: Sequence[Rollout], hints: Sequence[str | None], tools: MethodTools, keeps_unhinted: bool
) -> tuple[list[Rollout], Mapping[str, float]]:
    """Return the rollouts whose teacher sees their hint, and hints/share, the share of all rollouts with a hint.

    ``hints[i]`` belongs to ``rollouts[i]``; None is no hint, and so is a hint that does not fit into the teacher's
    prompt.  ``keeps_unhinted``: whether rollouts without a hint stay, without a teacher; else they are left out.
    Collectives: one sum over the data-parallel ranks.
    """
    chosen = []
    for rollout, hint in zip(rollouts, hints, strict=True):
        pair = tools.given.pair_with(rollout.problem, hint) if hint is not None else None
        if hint is not None and pair is not None:
            chosen.append(replace(rollout, problem=replace(rollout.problem, solution=hint), prompts=pair))
        elif keeps_unhinted:
            chosen.append(rollout.without_hint())
    num_hinted, number = over_replicas((sum(rollout.hinted for rollout in chosen), len(rollouts)), tools.grid)
    return chosen, {"hints/share": num_hinted / max(number, 1)}
