# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sources whose responses are given and not sampled.

`SolutionsAsResponses` takes the solutions of the data, which supervised fine-tuning (``method.name=sft``) imitates.
`Replay` takes the responses that another run has recorded: the same tokens in every layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problem_sampler import shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.recordings import Recording
from megatron_selfdistill.sources.source import ResponseSource, SourceState, StepBatch


class SolutionsAsResponses(ResponseSource):
    """One response per problem: the text of its solution, and the token that ends a response."""

    def __init__(
        self, state: SourceState, tokenizer: Tokenizer, stop_token: int, grid: RankGrid, phases: Phases
    ) -> None:
        super().__init__(state)
        self._tokenizer, self._stop_token, self._grid, self._phases = tokenizer, stop_token, grid, phases

    def next_step(self, step: int, sampling: SamplingParams) -> StepBatch:
        """Return the batch of this replica's share of the next global batch of problems; nothing is sampled."""
        method, problem_sampler = self.state.method, self.state.problem_sampler.fork()
        problems = shard(problem_sampler.next_batch(), self._grid.dp_rank, self._grid.dp_size)
        with self._phases("pack"):
            responses = [self._response(problem, sampling.max_new_tokens) for problem in problems]
            return StepBatch(
                problems=problems,
                responses=responses,
                contexts=build_contexts([method.prompts(problem) for problem in problems], responses),
                solutions=[problem.solution for problem in problems],
                next_state=SourceState(problem_sampler, method),
            )

    def metrics(self, batch: StepBatch, output: StepOutput) -> dict[str, float]:
        """Return the `step_metrics` of the batch.  Collective."""
        return step_metrics(output, batch.sampler_log_probs, self._grid, response_lengths=batch.response_lengths)

    def _response(self, problem: Problem, limit: int) -> Response:
        """Return the solution's own text as a response of at most ``limit`` tokens, with unknown log-probs."""
        tokens = [*self._tokenizer.encode(problem.solution), self._stop_token]
        return Response.unsampled(tokens[:limit], "stop" if len(tokens) <= limit else "length")


class Replay(OnPolicy):
    """Responses of another run, for the problems, samples and steps that this run would have sampled."""

    def __init__(self, state: SourceState, options: OnPolicyOptions, recording: Recording) -> None:
        super().__init__(state, options)
        self._recording = recording

    def _responses(
        self, step: int, keys: Sequence[SampleKey], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Response]:
        """Return the recorded responses of ``keys``.  Raises: KeyError for a key that was not recorded."""
        with self._options.phases("rollout"):
            return self._recording.responses(keys)
