# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses that the student samples with its weights of this moment, to the problems of the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.controls import Controls
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problem_sampler import ProblemSampler, shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.guards import WEIGHTS_POSITION
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.staleness import staleness_metrics
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.episode_player import EpisodePlayer
from megatron_selfdistill.sources.judge import reward_metrics
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.rollouts import Rollout, Sample
from megatron_selfdistill.sources.source import ResponseSource, SourceState, StepBatch
from megatron_selfdistill.sources.step_terms import with_metrics_of_weights

if TYPE_CHECKING:
    from megatron_selfdistill.data.episode_reply import Reply

NUM_REACHED, LEAST_HORIZON = 8, 8
"""The number of steps that `following_horizon` looks back, and the least horizon that it chooses, in tokens."""


@dataclass(frozen=True)
class OnPolicyOptions:
    """The options with which the student's own responses become batches."""

    sampler: Sampler
    phases: Phases
    grid: RankGrid
    seed: int
    """The seed of the run."""
    num_samples: int
    """The number of responses per problem and step."""
    judges: bool
    """Whether all responses of a step get rewards."""
    weight_cap: float
    """The largest importance weight of the difference between student and sampler, for the metrics."""
    samples_teacher: bool
    """Whether responses are sampled after the teacher's prompt."""
    player: EpisodePlayer | None
    """The player of episodes; None if nothing replies."""
    max_staleness: int
    """The number of steps by which the weights that sampled a response may be older than the student's."""
    controls: Controls | None
    """The hints of other problems that the teacher reads the responses after; None for a target without controls."""
    horizon_at: Callable[[int], int | None] | None = None
    """The step -> the greatest number of tokens of its responses; None bounds no further than the sampling itself."""
    adapts_horizon: bool = False
    """Whether `following_horizon` takes the place of ``horizon_at``."""


@dataclass(frozen=True)
class AskedProblems:
    """The problems of a step on this replica, and the samples of their first responses."""

    problems: list[Problem]
    samples: list[Sample]
    """Each sample with its problem and the problem's prompts."""
    openings: Sequence[Reply | None] = ()
    """The reply before each sample's response; empty if nothing replies."""


class OnPolicy(ResponseSource):
    """Responses of the student to the problems of the data, ``num_samples`` per problem, problem by problem."""

    def __init__(self, state: SourceState, options: OnPolicyOptions) -> None:
        super().__init__(state)
        self._options = options

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of this replica's share of the next global batch of problems.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        method: Method = self.state.method
        found: Mapping[str, float] = {}
        if method.prepare is not None:
            method, found = method.prepare(step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        asked = self._asked(step, problem_sampler.next_batch(), method)
        options = self._options
        if options.player is not None:
            samples, openings = options.player.opened(asked.samples, method)
            asked = replace(asked, samples=samples, openings=openings)
        played, num_cut = self._rollouts(step, asked, method, sampling)
        rollouts, rewarded = self._rewarded(method, played)
        with options.phases("rollout"):
            later = method if method.record is None else method.record(rollouts)
            next_state = self._state_after(problem_sampler, later, rollouts)
            selected, counts = method.select(step, rollouts)
        with options.phases("pack"):
            if options.max_staleness:
                responses = [rollout.response for rollout in rollouts]
                rewarded = {**rewarded, **staleness_metrics(responses, step, options.grid)}
            if options.judges:
                rewarded = {**rewarded, **reward_metrics(rollouts, selected, options.grid)}
            if options.player is not None:
                rewarded = {**rewarded, **options.player.metrics(rollouts, num_cut)}
            trained, added = method.texts(rollouts, selected)
        batch = self._batch(step, method, trained)
        if (horizon := self._horizon(step, sampling)) is not None:
            counts = {**counts, "rollout/horizon": horizon}
        if options.adapts_horizon and (position := int(batch.metrics.get(WEIGHTS_POSITION, 0))):
            next_state = replace(next_state, reached=(*next_state.reached, position)[-NUM_REACHED:])
            following = following_horizon(next_state.reached, sampling.max_new_tokens)
            counts = {**counts, "rollout/next_horizon": following}
        return replace(
            batch,
            problems=asked.problems,
            responses=[rollout.response for rollout in rollouts],
            metrics={**found, **counts, **rewarded, **added, **batch.metrics},
            next_state=next_state,
        )

    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return the `step_metrics` of the batch, which compare student and sampler.  Collective."""
        options = self._options
        return step_metrics(output, batch.sampler_log_probs, options.grid, options.weight_cap, batch.response_lengths)

    def _rewarded(self, method: Method, rollouts: Sequence[Rollout]) -> tuple[Sequence[Rollout], Mapping[str, float]]:
        """Return the rollouts with their rewards, where the run judges them, and metrics.  Collective."""
        return method.rewarded(rollouts) if self._options.judges else (rollouts, {})

    def _state_after(self, problem_sampler: ProblemSampler, method: Method, rollouts: Sequence[Rollout]) -> SourceState:
        """Return the state after a step with these ``rollouts``, all of the step on this replica."""
        return replace(self.state, problem_sampler=problem_sampler, method=method)

    def _batch(self, step: int, method: Method, trained: Sequence[Rollout]) -> StepBatch:
        """Return the contexts of the rollouts that are trained on, with their coefficients.  Collective."""
        with self._options.phases("pack"):
            contexts = build_contexts([it.prompts for it in trained], [it.response for it in trained])
            if self._options.player is not None:
                contexts = self._options.player.with_turns(contexts, trained)
            if self._options.controls is not None:
                contexts = self._options.controls.added(step, contexts, trained)
        batch = StepBatch(
            contexts=contexts,
            solutions=[rollout.problem.solution for rollout in trained],
            sampler_log_probs=self._on_device(map(_comparable, trained)) if method.comparable else None,
            token_coefficients=method.coefficients(step, trained, contexts),
        )
        return batch if batch.token_coefficients is None else with_metrics_of_weights(batch)

    def _asked(self, step: int, global_batch: Sequence[Problem], method: Method) -> AskedProblems:
        grid, num_samples = self._options.grid, self._options.num_samples
        problems = shard(global_batch, grid.dp_rank, grid.dp_size)
        first = shard(first_sample_indices(global_batch, num_samples), grid.dp_rank, grid.dp_size)
        samples = []
        for problem, start in zip(problems, first, strict=True):
            pair = method.prompts(problem)
            samples += [(SampleKey(step, problem.id, start + i), problem, pair) for i in range(num_samples)]
        return AskedProblems(problems, samples)

    def _rollouts(
        self, step: int, asked: AskedProblems, method: Method, sampling: SamplingParams
    ) -> tuple[list[Rollout], int]:
        """Return the rollouts of all episodes, and how many episodes end early; see `EpisodePlayer`."""

        def generate(keys: Sequence[SampleKey], pairs: Sequence[PromptPair]) -> list[Response]:
            return self._marked(step, keys, list(map(self._request, keys, pairs)), sampling)

        requests = self._first_requests(asked.samples, method)
        responses = self._marked(step, [key for key, _, _ in asked.samples], requests, sampling)
        openings = asked.openings or [None] * len(responses)
        first = [
            Rollout(problem, pair, response, group=i // self._options.num_samples, key=key, opening=opening)
            for i, ((key, problem, pair), response, opening) in enumerate(
                zip(asked.samples, responses, openings, strict=True)
            )
        ]
        player = self._options.player
        return (first, 0) if player is None else player.played(first, method, generate)

    def _first_requests(self, samples: Sequence[Sample], method: Method) -> list[Request]:
        return [self._request(key, pair) for key, _, pair in samples]

    def _request(self, key: SampleKey, pair: PromptPair) -> Request:
        prompt = pair.teacher_prompt if self._options.samples_teacher else pair.student_prompt
        name = None if self._options.player is None else self._options.player.name(key)
        return Request(prompt, key.seed(self._options.seed), episode=name)

    def _marked(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return the responses of the step within its horizon, of which those that end there are unfinished."""
        horizon = self._horizon(step, sampling)
        return sampling.marked(self._responses(step, keys, requests, sampling), horizon)

    def _horizon(self, step: int, sampling: SamplingParams) -> int | None:
        if self._options.adapts_horizon:
            return following_horizon(self.state.reached, sampling.max_new_tokens)
        return None if self._options.horizon_at is None else self._options.horizon_at(step)

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        self._options.sampler.update_weights(step)
        with self._options.phases("rollout"):
            return self._options.sampler.generate(requests, sampling.up_to(self._horizon(step, sampling)))

    def _on_device(self, log_probs: Iterable[Sequence[float]]) -> torch.Tensor:
        """Return ``log_probs``, one sequence per response, as [R_total] float64 on the device, without a wait."""
        joined = torch.tensor([value for values in log_probs for value in values], dtype=torch.float64)
        return to_device(joined, self._options.grid.device)


def following_horizon(reached: Sequence[int], most: int) -> int:
    """Return the horizon after steps with the `WEIGHTS_POSITION` ``reached``: twice the largest, as room to grow.

    The horizon is at least `LEAST_HORIZON`, unless ``most`` is less, and at most ``most``, where it begins.
    """
    return min(most, max(LEAST_HORIZON, 2 * max(reached))) if reached else most


def first_sample_indices(batch: Sequence[Problem], num_samples: int) -> list[int]:
    """Return the index of each problem's first sample: 0, or more where the problem comes again in the same batch.

    An epoch can end within a batch; the samples of a problem that comes twice then count on.
    """
    seen: Counter[str] = Counter()
    first = []
    for problem in batch:
        first.append(seen[problem.id])
        seen[problem.id] += num_samples
    return first


def _comparable(rollout: Rollout) -> Sequence[float]:
    """Return the sampler's log-probs of a rollout's tokens; infinity where they are those after another prompt."""
    response = rollout.response
    return response.log_probs if rollout.part == "response" else [math.inf] * len(response.token_ids)
