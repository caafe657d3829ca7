# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of a run, built in the order of the data flow, and what one step does with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_selfdistill import schedule
from megatron_selfdistill.checkpoint.megatron import (
    Checkpointer,
    load_frozen_teacher,
    load_weights,
    megatron_args,
    save_frozen_teacher,
)
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair, PromptPair, build_contexts, fit_teacher_prompt
from megatron_selfdistill.data.packing import PackedBatch, pack, pad_to_count, required_seq_length
from megatron_selfdistill.data.problems import Problem, ProblemStream, shard
from megatron_selfdistill.evaluate import EvaluationResult, evaluate, load_verifier
from megatron_selfdistill.guards import Guards, RunUnhealthy, check_identity, check_teacher_canary
from megatron_selfdistill.inputs import Inputs
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.target import Target, solve_batch_k
from megatron_selfdistill.loss.vocab_parallel import VocabShard
from megatron_selfdistill.metrics import MetricsLog, Phases, batch_entropies, rollout_metrics, step_metrics
from megatron_selfdistill.model.architecture import padded_vocab_size, transformer_config
from megatron_selfdistill.model.build import build_chunks, build_optimizer, unwrapped, wrap_for_training
from megatron_selfdistill.parallel import Grid
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, stream_seed
from megatron_selfdistill.rollout.megatron import MegatronSampler
from megatron_selfdistill.rollout.recorded import Recorder, RecordedSampler
from megatron_selfdistill.teacher import Teacher


class Run:
    """Model, teacher, sampler, optimizer, data and checkpoints of one rank, and the steps between them.

    Every rank of the world makes the same calls in the same order.
    """

    def __init__(self, config: Config, inputs: Inputs, grid: Grid) -> None:
        self.config, self.inputs, self.grid = config, inputs, grid
        self.run_dir = Path(config.run_dir)
        self.phases = Phases()
        self._build_model()
        self._build_data()
        self.guards = Guards(config.guards)
        self.verify = load_verifier(config.evaluation.verifier)
        self.checkpointer = Checkpointer(
            self.run_dir, grid, keep_last=config.checkpoint.keep_last, async_save=config.checkpoint.async_save
        )
        self.step = 0
        self.batch_k: float | None = None  # of target.rule=batch: solved from the step before
        self._resume_or_start()
        self.log = MetricsLog(
            self.run_dir,
            num_steps=config.num_steps,
            tensorboard=config.metrics.tensorboard,
            console=config.metrics.console,
            console_every=config.metrics.console_every,
            enabled=grid.is_reporter,
        )
        self.log.resume(self.step)

    # -- one step, in the order of the loop ---------------------------------------------------------------------

    def next_problems(self) -> list[Problem]:
        """This replica's share of the next global batch."""
        return shard(self.stream.next_batch(), self.grid.dp_rank, self.grid.dp_size)

    def generate(self, problems: Sequence[Problem]) -> list[Response]:
        """``rollout.num_samples`` responses per problem, problem by problem, by the current weights."""
        with self.phases("rollout"):
            if self.config.objective == "solutions":
                return [self._solution(problem) for problem in problems]
            keys = [(self.step, p.id, i) for p in problems for i in range(self.config.rollout.num_samples)]
            if self.recording is not None:
                responses = self.recording.responses(keys)
            else:
                requests = [
                    Request(pair.student_prompt, stream_seed(self.config.seed, *key))
                    for pair, key in zip(self._prompts(problems), keys, strict=True)
                ]
                responses = self.sampler.generate(requests, self.sampling)
            if self.config.rollout.record:
                record(self.config.rollout.record, keys, responses, self.grid.dp_group, self.grid.is_reporter)
            return responses

    def pack(self, problems: Sequence[Problem], responses: Sequence[Response]) -> PackedBatch:
        """Both contexts of every response as microbatches: as many, and as long, on every replica."""
        with self.phases("pack"):
            contexts = build_contexts(self._prompts(problems), responses)
            self.sampler_log_probs: torch.Tensor | None = torch.tensor(
                [value for response in responses for value in response.log_probs], dtype=torch.float64
            )
            if self.config.objective == "verified_rollouts":
                owners = [p for p in problems for _ in range(self.config.rollout.num_samples)]
                right = [self._is_right(p, r) for p, r in zip(owners, responses, strict=True)]
                contexts = [context for context, keep in zip(contexts, right, strict=True) if keep]
            if self.config.objective != "self_distillation":
                self.sampler_log_probs = None
            return self._pack(contexts)

    def forward_backward(self, batch: PackedBatch) -> schedule.StepOutput | None:
        """Gradients of the batch in ``main_grad``; None where no replica has a response to train on."""
        has_tokens = torch.tensor([len(batch.response_tokens)], device=self.grid.device)
        dist.all_reduce(has_tokens, group=self.grid.dp_group)
        if not has_tokens.item():
            return None
        with self.phases("train"):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with self._teaching() as teacher:
                return self._schedule(batch, teacher, self._row_loss())

    def update(self, output: schedule.StepOutput | None) -> dict[str, float]:
        """Check the numbers, apply the gradient, move the teacher; returns the step's metrics, equal on all ranks.

        Raises `RunUnhealthy` for a number that is not finite; the gradient is then not applied.
        """
        if output is None:
            return {}
        metrics = step_metrics(output, self.sampler_log_probs, self.grid)
        with self.phases("optimizer"):
            self.optimizer.prepare_grads()
            metrics["gradient_norm"] = float(self.optimizer.get_grad_norm())
            self.guards.check_finite(self.step, metrics)
            self.scheduler.step(1)
            self.optimizer.step()
            self.teacher.update(self.optimizer)
        metrics["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if self.config.target.rule == "batch":
            self.batch_k = solve_batch_k(*batch_entropies(output, self.grid), self._target().k_bound)
        self.sampler.update_weights()
        return metrics

    def finish_step(self, metrics: dict[str, float], responses: Sequence[Response], batch: PackedBatch) -> None:
        """Count the step; log, evaluate, guard and save what is due."""
        metrics |= rollout_metrics(responses, self.grid) | self._padding(batch)
        self.step += 1
        every = self.config.evaluation.every
        if every and self.step % every == 0:
            metrics |= self.evaluate().metrics()
        self.log.log(self.step, metrics | self.phases.metrics())
        self.guards.check(self.step, metrics)
        save_every = self.config.checkpoint.save_every
        if self.step == self.config.num_steps or (save_every and self.step % save_every == 0):
            self.save()
        self.checkpointer.poll()

    def check_first_step(self, batch: PackedBatch, contexts_seen: None = None) -> None:
        ...
