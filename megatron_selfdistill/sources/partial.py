# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Steps that do not wait for their longest responses: these go on in the next step, with their tokens kept."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem, ProblemSampler, shard
from megatron_selfdistill.distributed.collectives import gather_items, gather_objects
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.method import prepared
from megatron_selfdistill.sources.on_policy import AskedProblems, OnPolicy, OnPolicyOptions, first_sample_indices
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.source import SourceState, StepBatch, Visit


@dataclass(frozen=True)
class PartialOptions:
    """The sizes of a step with partial responses."""

    batch_size: int
    """The number of problems that a step trains on, over all replicas."""
    extra_problems: int
    """The number of further problems whose responses are under way."""
    max_new_tokens: int
    """The greatest length of a response in tokens."""
    round_tokens: int
    """The number of tokens that a response gets at most before the step looks whether it has enough, a divisor of
    ``max_new_tokens``."""
    max_staleness: int
    """The number of steps after its first one in which a response must be trained on."""
    num_steps: int
    """The number of steps of the run."""


class PartialOnPolicy(OnPolicy):
    """The responses of `OnPolicy`, where each step trains on the problems whose responses are finished first.

    ``extra_problems`` more problems than a step trains on are under way.  Engines generate in rounds of
    ``round_tokens`` per response, until every replica has its share of finished problems; the other responses keep
    their tokens, which the next step's weights read again and continue.  A step also waits for the problems that the
    next steps could not train on within ``max_staleness`` (`is_enough`), so that none is dropped.
    """

    def __init__(
        self, state: SourceState, options: OnPolicyOptions, sizes: PartialOptions, problems: Sequence[Problem]
    ) -> None:
        """``problems``: those of the data."""
        super().__init__(state, options)
        self._sizes, self._problems = sizes, problems

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of the problems of this replica that are finished first.

        Raises: `EngineError` on all ranks where responses could not be sampled.
        """
        grid, sizes, limit = self._options.grid, self._sizes, self._sizes.max_new_tokens
        method, found = prepared(self.state.method, step, sampling, self.state.problem_sampler)
        problem_sampler = self.state.problem_sampler.fork()
        visits = self._visits(step, problem_sampler)
        places = shard(range(len(visits)), grid.dp_rank, grid.dp_size)
        needed = sizes.batch_size // grid.dp_size
        own, num_rounds = {place: visits[place] for place in places}, 0
        pairs = {place: method.prompts(visit.problem) for place, visit in own.items()}
        self._options.sampler.update_weights(step)
        with self._options.phases("rollout"):
            while not all(gather_objects(is_enough(list(own.values()), step, needed, sizes))):
                own = self._continued(own, pairs, sampling)
                num_rounds += 1
        finished = [place for place in places if not own[place].unfinished(limit)]
        chosen = finished[:needed]  # the oldest first
        asked, rollouts = _finished([(own[place], pairs[place]) for place in chosen])
        carried = gather_items([(place, own[place]) for place in places if place not in chosen], grid.dp_group)
        batch = self._step_batch(step, asked, rollouts, 0, method, found, problem_sampler)
        assert batch.next_state is not None
        waiting = [visit for _, visit in sorted(carried, key=lambda pair: pair[0])]
        under_way = sum(len(visit.unfinished(limit)) for visit in waiting)
        return replace(
            batch,
            metrics={**batch.metrics, "rollout/rounds": num_rounds, "rollout/carried_responses": under_way},
            next_state=replace(batch.next_state, visits=tuple(waiting)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the committed state as plain values, with the tokens of the responses under way."""
        return {**super().state_dict(), "visits": [visit.to_json() for visit in self.state.visits]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the committed state by the one that `state_dict` returned."""
        super().load_state_dict(state)
        problems = {problem.id: problem for problem in self._problems}
        sizes = self._sizes
        visits = tuple(
            Visit.from_json(fields, problems).without_odd_lengths(sizes.max_new_tokens, sizes.round_tokens)
            for fields in state.get("visits", [])
        )
        self._state = replace(self._state, visits=visits)

    def _visits(self, step: int, problem_sampler: ProblemSampler) -> list[Visit]:
        """Return the visits of this step over all replicas, the oldest first: those under way, then new ones.

        The last steps begin no visit that no step would train on.
        """
        sizes, num_samples = self._sizes, self._options.num_samples
        left = sizes.batch_size * max(sizes.num_steps - step, 1)
        count = min(max(sizes.batch_size + sizes.extra_problems, len(self.state.visits)), left)
        under_way = list(self.state.visits)[:count]
        new = problem_sampler.take(count - len(under_way))
        nothing: tuple[Response | None, ...] = (None,) * num_samples
        first = first_sample_indices(new, num_samples)
        return [*under_way, *(Visit(step, problem, i, nothing) for problem, i in zip(new, first, strict=True))]

    def _continued(
        self, own: Mapping[int, Visit], pairs: Mapping[int, PromptPair], sampling: SamplingParams
    ) -> dict[int, Visit]:
        """Return the visits with at most ``round_tokens`` more tokens of each unfinished response.  Collective.

        ``own``, ``pairs``: the visits of this replica and the prompts of their problems, by place.
        """
        visits, limit = dict(own), self._sizes.max_new_tokens
        todo = [(place, sample) for place, visit in own.items() for sample in visit.unfinished(limit)]
        requests = [self._next_request(own[place], sample, pairs[place]) for place, sample in todo]
        params = replace(sampling, max_new_tokens=self._sizes.round_tokens)
        responses = self._options.sampler.generate(requests, params)
        for (place, sample), response in zip(todo, responses, strict=True):
            visits[place] = visits[place].with_response(sample, response)
        return visits

    def _next_request(self, visit: Visit, sample: int, pair: PromptPair) -> Request:
        """Return the request for the next tokens of a sample."""
        request = self._request(visit.key(sample), pair, is_guided=False)
        before = visit.responses[sample]
        if before is None:
            return request
        return replace(request, prompt=[*request.prompt, *before.token_ids], begun=len(before.token_ids))


def _finished(visits: Sequence[tuple[Visit, PromptPair]]) -> tuple[AskedProblems, list[Rollout]]:
    """Return the problems of finished visits, and the rollouts of their responses, one visit after the other."""
    samples, rollouts = [], []
    for group, (visit, pair) in enumerate(visits):
        for i, response in enumerate(visit.responses):
            assert response is not None, "a finished visit has all responses"
            samples.append((visit.key(i), visit.problem, pair))
            rollouts.append(Rollout(visit.problem, pair, response, group=group, key=visit.key(i)))
    return AskedProblems([visit.problem for visit, _ in visits], (), samples), rollouts


def is_enough(visits: Sequence[Visit], step: int, needed: int, sizes: PartialOptions) -> bool:
    """Return whether a replica can train on ``needed`` of its ``visits``, and on the others in time.

    A visit must be trained on in one of the ``max_staleness`` steps after the one in which it has begun.  So of the
    visits that must be trained on within the next j steps, all but j ``needed`` must be among those of this step.
    """
    finished = [not visit.unfinished(sizes.max_new_tokens) for visit in visits]
    if sum(finished) < needed:
        return False
    for later in range(sizes.max_staleness):
        within = [visit.step + sizes.max_staleness <= step + later for visit in visits]
        num_finished = sum(map(operator.and_, within, finished))
        if sum(within) - num_finished > later * needed:
            return False
    return True
