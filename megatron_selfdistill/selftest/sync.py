# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler against the trainer: it samples what the trainer's own weights would sample, before and after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.data.contexts import PromptPair, build_contexts
from megatron_selfdistill.data.problems import shard
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.selftest.outcome import Figure, Outcome
from megatron_selfdistill.selftest.tiny import LaunchUnderTest
from megatron_selfdistill.sources.configured_source import given_solutions
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.trainer import Trainer

BOUND = 1e-3 if cpu.ON_CPU else 0.25
"""The bound in nats per token: the rounding of float32, or of bf16 through all layers and in logits of some nats."""
STALE = 4 * BOUND
"""The nats by which the weights of the previous step must differ at some token; else agreement proves nothing."""


@dataclass(frozen=True)
class SyncDifferences:
    """The differences of sampler and trainer over the response tokens on this rank; None where it holds no token."""

    below_best: float | None
    """The largest distance in nats from the trainer's log-prob of a token to that of the trainer's best token."""
    apart: float | None
    """The largest difference between the log-probs of sampler and trainer, in nats."""


def weight_sync(launch: LaunchUnderTest) -> Outcome:
    """Compare the sampler's greedy tokens and log-probs with the trainer's, each time the weights were sent."""
    even, many = launch.world_size % 2 == 0, launch.world_size % 4 == 0
    cuts = launch.cut(tp=2 if even else 1, pp=2 if many else 1)
    config = launch.config(
        cuts,
        launch.new_run_dir("sync"),
        f"rollout.engine={launch.sampler}",
        "rollout.temperature=0",
        "optimizer.lr=0.02",  # Adam moves each weight by that much
        *(["+rollout.engine_args.enforce_eager=true"] if launch.sampler == "vllm" else []),  # compiling takes minutes
    )
    run_data = RunData.load(config)
    trainer = Trainer(config, run_data, launch.grid(cuts))
    try:
        prompts = _prompts(trainer)
        first = _sampled(trainer, prompts, version=0)
        before = _compared(trainer, prompts, first)
        batch = StepBatch(responses=first, contexts=build_contexts(prompts, first))
        trainer.update([trainer.forward_backward(batch, trainer.pack(batch))])
        stale = _compared(trainer, prompts, first)
        after = _compared(trainer, prompts, _sampled(trainer, prompts, version=1))
    finally:
        trainer.close()
    return Outcome(
        (
            Figure("greedy tokens below the trainer's best, nats", _larger(before.below_best, after.below_best), BOUND),
            Figure("log-probs off the trainer's, nats", _larger(before.apart, after.apart), BOUND),
            Figure("the same after a step without a sync", stale.apart, STALE, at_least=True),
        ),
    )


def _prompts(trainer: Trainer) -> list[PromptPair]:
    """Return the prompts of this replica's share of the first problems of the data."""
    config, grid = trainer.config, trainer.grid
    problems = trainer.run_data.problems.problems[: config.data.global_batch_size]
    prompts = given_solutions(config, trainer.run_data)
    return [prompts.pair(problem) for problem in shard(problems, grid.dp_rank, grid.dp_size)]


def _sampled(trainer: Trainer, prompts: Sequence[PromptPair], version: int) -> list[Response]:
    trainer.sampler.update_weights(version)
    requests = [Request(pair.student_prompt, seed=i) for i, pair in enumerate(prompts)]
    return trainer.sampler.generate(requests, trainer.sampling)


def _compared(trainer: Trainer, prompts: Sequence[PromptPair], responses: Sequence[Response]) -> SyncDifferences:
    """Return the comparison of these responses with one forward pass of the trainer's present weights."""
    trainer.sampler.sleep()
    learner, grid = trainer.learner, trainer.grid
    packed = learner.pack(build_contexts(prompts, responses))
    best: list[Tensor] = []

    def greedy(student: Tensor, teacher: Tensor | None, tokens: Tensor, vocab: VocabShard) -> TokenStats:
        largest = student[:, : vocab.num_valid].float().amax(-1) if vocab.num_valid else _lowest(student)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=grid.tp_group)
        best.append(largest - _logit(student, tokens, vocab, grid))
        return token_losses.next_token(student, None, tokens, vocab)  # which writes over the logits

    output = schedule.run(learner.chunks, None, packed, greedy, grid, learner.vocab, forward_only=True)
    if output.stats is None or not len(output.response_ids):
        return SyncDifferences(None, None)
    stated = torch.tensor([x for response in responses for x in response.log_probs], dtype=torch.float64)
    own = output.stats.student_log_prob.double().cpu()
    return SyncDifferences(torch.cat(best).max().item(), (own - stated[output.response_ids.cpu()]).abs().max().item())


def _logit(student: Tensor, tokens: Tensor, vocab: VocabShard, grid: RankGrid) -> Tensor:
    """Return the logit [R] of each token, float32, from the rank that holds it."""
    here = (tokens >= vocab.start) & (tokens < vocab.start + vocab.num_valid)
    local = (tokens - vocab.start).clamp(0, vocab.size - 1)
    logit = torch.where(here, student.float().gather(1, local[:, None]).squeeze(1), _lowest(student))
    dist.all_reduce(logit, op=dist.ReduceOp.MAX, group=grid.tp_group)
    return logit


def _lowest(student: Tensor) -> Tensor:
    return torch.full((student.size(0),), float("-inf"), device=student.device)


def _larger(one: float | None, other: float | None) -> float | None:
    """Return the larger of two differences on the same rank; NaN stays NaN."""
    if one is None or other is None:
        return one if other is None else other
    return one if one != one or one > other else other
