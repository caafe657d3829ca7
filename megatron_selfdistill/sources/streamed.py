# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student that are trained on in waves, while servers still generate others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.streaming import StreamingSampler, WaveRule
from megatron_selfdistill.sources.ahead import AheadOnPolicy
from megatron_selfdistill.sources.on_policy import OnPolicyOptions
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import reward_metrics
from megatron_selfdistill.sources.source import SourceState, StepBatch


class StreamedOnPolicy(AheadOnPolicy):
    """The responses of `AheadOnPolicy`, in waves of whole groups in the order in which they arrive.

    What a step does to a response depends on its group alone here: `Config` refuses rules that look at the whole step,
    and prompts that the responses of a step change.
    """

    def __init__(
        self,
        state: SourceState,
        options: OnPolicyOptions,
        sampler: StreamingSampler[Any],
        ahead: int,
        num_steps: int,
        min_tokens: int,
    ) -> None:
        """``min_tokens``: as in `WaveRule`; the other arguments are those of `AheadOnPolicy`."""
        super().__init__(state, options, sampler, ahead, num_steps)
        self._rule = WaveRule(options.num_samples, min_tokens)

    def batches(self, step: int, sampling: SamplingParams) -> Iterator[StepBatch]:
        """Yield this replica's share of the next global batch of problems, wave by wave.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        options = self._options
        prompts, found = self.state.prompts.prepare(step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        asked = self._asked(step, problem_sampler.next_batch(), prompts)
        waves = self._sampler.stream(self._ticket(step, sampling), self._rule)
        judged: list[Answer] = []
        trained: list[Answer] = []
        is_last = False
        while not is_last:
            with options.phases("rollout"):
                wave = next(waves)
            is_last = wave.is_last
            turns = [self._turn(asked, index, response) for index, response in wave.responses.items()]
            answers, _ = self._rewarded(turns)
            self._record(turns)
            kept = self._in_views([answer for answer in answers if answer.correct or not options.only_right])
            judged, trained = judged + answers, trained + kept
            metrics = dict(found)
            if is_last:
                metrics |= self._staleness(step, judged)
            if is_last and options.judges:
                metrics |= reward_metrics(judged, trained, options.grid)
            yield replace(
                self._batch(step, kept, ()),
                problems=[turn.answer.problem for turn in turns[:: options.num_samples]],
                responses=[answer.response for answer in answers],
                metrics=metrics,
                next_state=SourceState(problem_sampler, prompts) if is_last else None,
                share=wave.share,
                ends_step=is_last,
            )

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the responses of all waves in one batch, without the coefficients of their tokens.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        return StepBatch.joined(list(self.batches(step, sampling)))
