# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The solutions of the data as responses, which supervised fine-tuning (``method.name=sft``) imitates."""

from __future__ import annotations

from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problem_sampler import shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import Response, SamplingParams
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
