# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints that are known once the responses of a step are sampled: from peers, from feedback, from a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.data.prompts import FEEDBACK_HEADING
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.group_functions import HintFunction, of_groups
from megatron_selfdistill.sources.problem_prompts import (
    Answer,
    GivenSolutions,
    Prompts,
    UnguidedPrompts,
    without_hint,
)
from megatron_selfdistill.sources.reward_metrics import over_replicas

Hints = Callable[[Sequence[Answer]], list[str | None]]
"""A function of this replica's answers, group by group, that returns the hint for each answer; None is no hint.

Every rank of the world calls it, and all ranks of a replica get the same hints.
"""

PEER_SECTION = "\nCorrect solution:\n\n{}"
"""SDPO's section with a peer in the teacher's prompt, between the problem and the closing sentence."""


@dataclass(frozen=True)
class HintedAfterSampling(UnguidedPrompts):
    """Prompts whose teacher sees a hint only once the responses are sampled."""

    inner: GivenSolutions
    """The prompts that show a chosen text as the solution."""
    grid: RankGrid
    keeps_unhinted: bool
    """Whether responses without a hint are trained on, for their rewards; else they are skipped."""

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered; the teacher's prompt is the student's."""
        return without_hint(self.inner.pair(problem))

    def has_solution(self, problem: Problem) -> bool:
        """Return False: the teacher sees no hint before the responses are sampled."""
        return False


@dataclass(frozen=True)
class HindsightPrompts(HintedAfterSampling):
    """Prompts that show the teacher hints about the responses that have just been sampled.

    A response without a hint, or whose hint does not fit into the teacher's prompt, has no teacher.
    """

    hints: Hints

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return these prompts and no metrics."""
        return self, {}

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with their hints, and hints/share, the share of all answers with a hint.

        Collectives: those of ``hints``, and one sum over the data-parallel ranks.
        """
        hints = self.hints(answers)
        return chosen_with_hints(answers, hints, self.inner, self.grid, self.keeps_unhinted)

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return these prompts: no answer changes the prompts of later steps."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the inner prompts: hints live for one step."""
        return self.inner.state_dict()

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts, which have no state."""
        return self


def chosen_with_hints(
    answers: Sequence[Answer],
    hints: Sequence[str | None],
    inner: GivenSolutions,
    grid: RankGrid,
    keeps_unhinted: bool,
) -> tuple[list[Answer], Mapping[str, float]]:
    """Return the answers whose teacher sees their hint, and hints/share, the share of all answers with a hint.

    ``hints[i]`` belongs to ``answers[i]``; None is no hint, and so is a hint that does not fit into the teacher's
    prompt.  ``keeps_unhinted``: whether answers without a hint stay, without a teacher; else they are left out.
    Collectives: one sum over the data-parallel ranks.
    """
    chosen = []
    for answer, hint in zip(answers, hints, strict=True):
        pair = inner.pair_with(answer.problem, hint) if hint is not None else None
        if hint is not None and pair is not None:
            chosen.append(replace(answer, problem=replace(answer.problem, solution=hint), prompts=pair))
        elif keeps_unhinted:
            chosen.append(answer.without_hint())
    num_hinted, number = over_replicas((sum(answer.hinted for answer in chosen), len(answers)), grid)
    return chosen, {"hints/share": num_hinted / max(number, 1)}


@dataclass(frozen=True)
class PeerHints:
    """The first other right response of the group, without its thinking.  Source: SDPO (arXiv 2601.20802)."""

    tokenizer: Tokenizer

    def __call__(self, answers: Sequence[Answer]) -> list[str | None]:
        """Return the hint of each answer; None where no other response of its group is right."""
        right: dict[int, list[int]] = {}
        for i, answer in enumerate(answers):
            if answer.correct:
                right.setdefault(answer.group, []).append(i)
        peers = [next((j for j in right.get(answer.group, ()) if j != i), None) for i, answer in enumerate(answers)]
        return [None if peer is None else self._text(answers[peer]) for peer in peers]

    def _text(self, answer: Answer) -> str:
        return without_thinking(response_text(answer.response, self.tokenizer))


def feedback_hints(answers: Sequence[Answer]) -> list[str | None]:
    """Return the environment's feedback on each response; None where there is none, or only white space."""
    return [answer.feedback if answer.feedback and answer.feedback.strip() else None for answer in answers]


@dataclass(frozen=True)
class PeerOrFeedbackHints:
    """The peer of a response in `PEER_SECTION`, or where it has none its feedback under `FEEDBACK_HEADING`.

    Source: SDPO (arXiv 2601.20802), with feedback only where there is no solution.
    """

    peers: PeerHints

    def __call__(self, answers: Sequence[Answer]) -> list[str | None]:
        """Return the section of each answer; None where it has neither a peer nor feedback."""
        sections: list[str | None] = []
        for peer, feedback in zip(self.peers(answers), feedback_hints(answers), strict=True):
            if peer is not None:
                sections.append(PEER_SECTION.format(peer))
            else:
                sections.append(None if feedback is None else FEEDBACK_HEADING + feedback)
        return sections


@dataclass(frozen=True)
class FunctionHints:
    """Hints from the user's function of a problem and of the responses to it."""

    function: HintFunction
    tokenizer: Tokenizer
    grid: RankGrid

    def __call__(self, answers: Sequence[Answer]) -> list[str | None]:
        """Return the hint of each answer; a text of white space is no hint.

        Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function
        failed, or returned anything but one text or None for each response.
        """
        hints = of_groups(self.function, "hint function", answers, self.tokenizer, self.grid)
        return [hint if hint is not None and hint.strip() else None for hint in hints]


def without_thinking(text: str) -> str:
    """Return the part of ``text`` after its last ``</think>``, without white space at its ends; else all of it."""
    return text.rpartition("</think>")[2].strip()
