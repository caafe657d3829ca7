# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints from peers: the teacher of a response sees another right response to the same problem, of the same step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions, Prompts, without_hint
from megatron_selfdistill.sources.reward_metrics import over_replicas


@dataclass(frozen=True)
class PeerPrompts:
    """Prompts that show the teacher the first other right response to the problem, among those of the same step.

    A response without such a peer, or whose peer does not fit into the teacher's prompt, has no hint.
    Source: SDPO (arXiv 2601.20802), where the peer's thinking is removed as well.
    """

    inner: GivenSolutions
    """The prompts that show a chosen solution."""
    grid: RankGrid
    keeps_unhinted: bool
    """Whether responses without a hint are trained on, for their rewards; else they are skipped."""

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return these prompts and no metrics."""
        return self, {}

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered; the teacher's prompt is the student's."""
        return without_hint(self.inner.pair(problem))

    def has_solution(self, problem: Problem) -> bool:
        """Return False: nothing is known before the responses are sampled."""
        return False

    def is_guided(self, problem: Problem) -> bool:
        """Return False: no problem is guided."""
        return False

    def guides(self, problem: Problem) -> bool:
        """Return False: responses are sampled from the student alone."""
        return False

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with their peers as hints, and hints/share, the share of all answers with a hint.

        Collectives: one sum over the data-parallel ranks.
        """
        peers: dict[int, list[int]] = {}
        for i, answer in enumerate(answers):
            if answer.correct:
                peers.setdefault(answer.group, []).append(i)
        chosen = []
        for i, answer in enumerate(answers):
            peer = next((j for j in peers.get(answer.group, ()) if j != i), None)
            taught = self._with_hint(answer, answers[peer]) if peer is not None else None
            if taught is not None:
                chosen.append(taught)
            elif self.keeps_unhinted:
                chosen.append(answer.without_hint())
        num_hinted, number = over_replicas((sum(answer.hinted for answer in chosen), len(answers)), self.grid)
        return chosen, {"hints/share": num_hinted / max(number, 1)}

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return these prompts: no answer changes the prompts of later steps."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the inner prompts: peers live for one step."""
        return self.inner.state_dict()

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts, which have no state."""
        return self

    def _with_hint(self, answer: Answer, peer: Answer) -> Answer | None:
        hint = without_thinking(response_text(peer.response, self.inner.builder.tokenizer))
        pair = self.inner.pair_with(answer.problem, hint)
        return None if pair is None else replace(answer, problem=replace(answer.problem, solution=hint), prompts=pair)


def without_thinking(text: str) -> str:
    """Return the part of ``text`` after its last ``</think>``, without white space at its ends; else all of it."""
    return text.rpartition("</think>")[2].strip()
