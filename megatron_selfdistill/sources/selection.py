# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Selections of a step's responses, which may drop responses or edit their texts before the step trains on them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_selfdistill.evaluation.calibration import split_confidence
from megatron_selfdistill.rollout.base import Response, sample_seed
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions

Select = Callable[[int, Sequence[Answer]], tuple[list[Answer], Mapping[str, float]]]
"""A function of the step and of this replica's answers, group by group: the answers to train on, and metrics.

The answers have rewards.  The result is a function of the step, the answers and the weights alone, so that no layout
changes it; the metrics are equal on all ranks.  Collective over the world.
"""

NOTE = "Note: The empirical confidence for this question is {:.2f}. Output this exact value in the 'Confidence:' field."
"""The note to the teacher, after the solution, under `StatedConfidence`."""


@dataclass(frozen=True)
class Balance:
    """As many right as wrong responses in every group, by dropping responses of the larger kind at random.

    A group with one kind of responses stays as it is.  Source: Uni-OPD (arXiv 2605.03677).
    """

    seed: int
    """The seed of the run."""

    def __call__(self, step: int, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the responses that stay, in their order, and no metrics."""
        kept = []
        for _, members in groupby(answers, key=lambda answer: answer.group):
            group = list(members)
            kinds = [[i for i, answer in enumerate(group) if answer.correct == kind] for kind in (True, False)]
            count = min(map(len, kinds))
            places = set(range(len(group)))
            if count:
                name = f"balance/{group[0].problem.id}"
                generator = random.Random(sample_seed(self.seed, step, name, 0))
                places = {place for kind in kinds for place in generator.sample(kind, count)}
            kept += [answer for i, answer in enumerate(group) if i in places]
        return kept, {}


@dataclass(frozen=True)
class StatedConfidence:
    """Responses that state how often their group is right, which the teacher is told, too.

    With P = the share of right responses of the group, the text of a response loses its statements of confidence and
    ends in a line "Confidence: P" with two decimals.  So does the solution in the teacher's prompt, and `NOTE` follows
    it.  A truncated response, an edited response that is longer than the limit, and a response whose teacher's prompt
    becomes too long are dropped.  The sampler's log-probs of an edited response are unknown.
    Source: CaOPD (arXiv 2604.16830).
    """

    inner: GivenSolutions
    """The prompts that show a chosen solution."""
    pattern: re.Pattern[str] | None
    """The pattern of a statement, as `split_confidence` takes it."""

    def __call__(self, step: int, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the edited answers, in their order, and no metrics."""
        edited = []
        for _, members in groupby(answers, key=lambda answer: answer.group):
            group = list(members)
            share = sum(answer.correct for answer in group) / len(group)
            edited += [answer for answer in (self._edited(one, share) for one in group) if answer is not None]
        return edited, {}

    def _edited(self, answer: Answer, share: float) -> Answer | None:
        inner, tokens = self.inner, answer.response.token_ids
        if answer.response.truncated:
            return None
        text = self._stating(inner.builder.tokenizer.decode(tokens[:-1]), share)
        token_ids = [*inner.builder.tokenizer.encode(text), tokens[-1]]
        hint = f"{self._stating(answer.problem.solution, share)}\n\n{NOTE.format(share)}"
        pair = replace(inner, policy="drop").pair_with(answer.problem, hint)  # a shortened hint would lose its note
        if pair is None or len(token_ids) > inner.max_new_tokens:
            return None
        unknown = [math.nan] * len(token_ids)
        response = Response(token_ids, unknown, unknown, "stop")
        return replace(answer, problem=replace(answer.problem, solution=hint), prompts=pair, response=response)

    def _stating(self, text: str, share: float) -> str:
        return f"{split_confidence(text, self.pattern)[1].rstrip()}\nConfidence: {share:.2f}"
