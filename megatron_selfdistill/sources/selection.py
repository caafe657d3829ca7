# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Selections of a step's responses, which may drop responses or edit their texts before the step trains on them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.calibration import split_confidence
from megatron_selfdistill.rollout.base import Response, response_text, sample_seed
from megatron_selfdistill.sources.group_functions import SelectFunction, of_groups
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
        return replace(
            answer, problem=replace(answer.problem, solution=hint), prompts=pair, response=Response.unsampled(token_ids)
        )

    def _stating(self, text: str, share: float) -> str:
        return f"{split_confidence(text, self.pattern)[1].rstrip()}\nConfidence: {share:.2f}"


@dataclass(frozen=True)
class FunctionSelection:
    """A selection by the user's function, which may keep, drop and edit the responses to a problem.

    An edited response consists of the tokens of its text and a stop token, keeps its reward, and has no log-probs of
    the sampler; an edited response that is longer than the limit is dropped.
    """

    function: SelectFunction
    tokenizer: Tokenizer
    grid: RankGrid
    stop_token_id: int
    """The token that ends an edited response."""
    max_new_tokens: int
    """The greatest length of a response in tokens, the stop token included."""
    needs_log_probs: str | None
    """The key that needs the sampler's log-probs, so that no response may be edited; None where no key does."""

    def __call__(self, step: int, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers that stay, in their order, with the texts that the function returned, and no metrics.

        Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function
        failed, returned anything but one text or None for each response, or edited a text that must stay.
        """
        key = self.needs_log_probs
        reason = None if key is None else f"{key} compares p with the probability that the sampled text had"
        name = "selection function"
        texts = of_groups(self.function, name, answers, self.tokenizer, self.grid, keeps_texts=reason)
        kept = []
        for answer, text in zip(answers, texts, strict=True):
            if text == response_text(answer.response, self.tokenizer):
                kept.append(answer)
            elif text is not None:
                token_ids = [*self.tokenizer.encode(text), self.stop_token_id]
                if len(token_ids) <= self.max_new_tokens:
                    kept.append(replace(answer, response=Response.unsampled(token_ids)))
        return kept, {}
