# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses of the student that are trained on in waves, while servers still generate others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.streaming import StreamingSampler, WaveRule
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import reward_metrics
from megatron_selfdistill.sources.source import SourceState, StepBatch


class StreamedOnPolicy(OnPolicy):
    """The responses of `OnPolicy`, in waves of whole groups in the order in which they arrive.

    What a step does to a response depends on its group alone here: `Config` refuses rules that look at the whole step,
    and prompts that the responses of a step change.
    """

    def __init__(
        self, state: SourceState, options: OnPolicyOptions, sampler: StreamingSampler, min_tokens: int
    ) -> None:
        """``sampler``: the sampler of ``options``; ``min_tokens``: as in `WaveRule`."""
        super().__init__(state, options)
        self._sampler, self._rule = sampler, WaveRule(options.num_samples, min_tokens)

    def batches(self, step: int, sampling: SamplingParams) -> Iterator[StepBatch]:
        """Yield this replica's share of the next global batch of problems, wave by wave.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        options = self._options
        prompts, found = self.state.prompts.prepare(step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        asked = self._asked(step, problem_sampler.next_batch(), prompts)
        requests = [self._request(key, pair, is_guided=False) for key, _, pair in asked.samples]
        self._sampler.update_weights(step)
        waves = self._sampler.stream(requests, sampling, self._rule)
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
