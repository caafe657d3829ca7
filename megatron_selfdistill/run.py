# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of a run, built in the order of the data flow, and what one step does with them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.checkpoint.directory import iteration_name
from megatron_selfdistill.checkpoint.formats.megatron_args import megatron_args
from megatron_selfdistill.checkpoint.run.checkpointer import Checkpointer, load_weights, load_weights_and_optimizer
from megatron_selfdistill.checkpoint.run.resumption import CONFIGURATION, Resumption, resumption
from megatron_selfdistill.checkpoint.run.run_directory import RunFolder
from megatron_selfdistill.config import Config, ConfigError, hidden
from megatron_selfdistill.config.bound_keys import stored_values
from megatron_selfdistill.data.contexts import ContextPair, build_contexts
from megatron_selfdistill.data.packing import PackedBatch
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.stop import Stop
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.evaluation.held_out import EvaluationResult, evaluate
from megatron_selfdistill.evaluation.inference import decided_output_layer, new_chunks
from megatron_selfdistill.evaluation.verify import load_verifier
from megatron_selfdistill.logged import read_all_turns
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.sharded.backend import in_use
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target, solve_batch_k
from megatron_selfdistill.loss.weighting import TruncatedImportance
from megatron_selfdistill.metrics import MetricsLog, Phases, batch_entropies, rollout_metrics, step_metrics
from megatron_selfdistill.metrics.guards import (
    Guards,
    check_identity,
    check_teacher_canary,
    warning_of_a_silent_teacher,
)
from megatron_selfdistill.metrics.samples import chosen, sample_of
from megatron_selfdistill.metrics.token_numbers import token_numbers
from megatron_selfdistill.model.build import build_optimizer, unwrapped, wrap_for_training
from megatron_selfdistill.model.fp8 import token_multiple
from megatron_selfdistill.model.host_to_device import to_device_in_one_copy
from megatron_selfdistill.model.optimizer_step import apply_gradients, gradient_norm
from megatron_selfdistill.model.output_layer import FusedLoss
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.batch import pack_everywhere
from megatron_selfdistill.pipeline.score import learnabilities
from megatron_selfdistill.report import next_steps
from megatron_selfdistill.rollout.base import Response, Sampler, SamplingParams
from megatron_selfdistill.rollout.factory import configured_target, make_sampler, sampling_params
from megatron_selfdistill.rollout.on_demand import OnDemandSampler
from megatron_selfdistill.rollouts import Rollouts
from megatron_selfdistill.run_data import RunData, turn_reader
from megatron_selfdistill.teacher import Teacher
from megatron_selfdistill.turns import Turns, turn_metrics, turn_weight

logger = logging.getLogger(__name__)

IDENTITY_CONTEXTS = 8  # per replica, read twice at the start of a run


class Run:
    """Model, teacher, sampler, optimizer, data and checkpoints of one rank.

    Every rank of the world makes the same calls in the same order.  ``step`` counts the optimizer steps done.
    """

    def __init__(
        self, config: Config, run_data: RunData, grid: RankGrid, prove_ownership: Callable[[], None] | None = None
    ) -> None:
        """``prove_ownership``: called on rank 0 before the run folder is written; raises `CheckpointError` where
        another run has taken the folder over (`RunLock.renew`)."""
        self.config, self.run_data, self.grid = config, run_data, grid
        self._prove_ownership, self._owns_folder = prove_ownership, True
        self.run_dir = Path(config.run_dir)
        self.loss_backend = self._loss_backend()
        self.phases = Phases(grid.device)
        self.checkpointer = Checkpointer(
            self.run_dir,
            grid,
            keep_last=config.checkpoint.keep_last,
            async_save=config.checkpoint.async_save,
            verify=config.checkpoint.verify,
            prove_ownership=prove_ownership,
        )
        resumption = self._resumption()
        self.resumed_from = resumption.saved.path if resumption is not None else None
        self.changes = resumption.changes if resumption is not None else ()  # of the configuration, for the log
        if config.logged and self.resumed_from is None and self._wants_all_turns_read():
            self.run_data = read_all_turns(config, run_data, grid)
        self._build_model()
        self.guards = Guards(config.guards)
        self.step = 0
        self.batch_k: float | None = None  # of target.rule=batch: solved from the step before
        self._sampler_log_probs: torch.Tensor | None = None
        self._token_weights: schedule.TokenWeights | None = None
        self._contexts: Sequence[ContextPair] = []  # of this step; none where the caller has packed its own
        self._turns = Turns([], [])  # of this step, where the responses are those of a log
        if resumption is not None:
            self._resume(resumption)
        self.folder = RunFolder(config, self.step)
        self._saved_step = self.step  # a run that starts anew needs no checkpoint of step 0
        self._checked = False  # the identity law and the teacher's canary, at the start of every launch
        self.log = MetricsLog(
            self.run_dir,
            num_steps=config.num_steps,
            tensorboard=config.metrics.tensorboard,
            console=config.metrics.console,
            console_every=config.metrics.console_every,
            enabled=grid.is_reporter,
        )
        if not config.dry_run:  # which writes nothing: another run may be using the folder
            self.log.resume(self.step)
        if config.metrics.show_samples and not config.shows_contents:
            self.log.message("metrics.show_samples: no samples, since conversations.show_contents=false")
        self.stop = Stop(
            None if config.dry_run else self.run_dir,
            grid,
            time_limit_minutes=config.stop.time_limit_minutes,
            margin_minutes=config.stop.margin_minutes,
        )

    # -- a step, in the order of the loop ------------------------------------------------------------------------

    def next_problems(self) -> list[Problem]:
        """This replica's share of the next global batch."""
        return self.rollouts.next_problems(self.step, self.sampling)

    def generate(self, problems: Sequence[Problem]) -> list[Response]:
        """``rollout.num_samples`` responses per problem, problem by problem, by the current weights.

        Raises `EngineError` on all ranks where an engine failed; a checkpoint saved then redoes the step.
        """
        return self.rollouts.generate(problems, self.step, self.sampling)

    def pack(self, problems: Sequence[Problem], responses: Sequence[Response]) -> PackedBatch:
        """Both contexts of every response as microbatches: as many, and as long, on every replica."""
        with self.phases("pack"):
            self._contexts, kept = self.rollouts.contexts(problems, responses)
            if self.config.logged:
                self._turns = Turns.of(problems, self._contexts)
                self._token_weights = turn_weight(self.config.conversations, self._turns, self.grid)
            elif self.config.objective != "sft":
                self._sampler_log_probs = self._on_device(response.log_probs for response in kept)
            if self.config.loss.rollout_correction == "truncated":
                drawn = self._on_device(response.sampled_log_probs for response in kept)
                self._token_weights = TruncatedImportance(drawn, self.config.loss.rollout_correction_cap)
            return self.pack_contexts(self._contexts)

    def pack_contexts(self, contexts: Sequence[ContextPair]) -> PackedBatch:
        """Microbatches of these contexts, for this replica; every replica calls it with its own."""
        return pack_everywhere(
            contexts,
            max_tokens=self.config.schedule.max_tokens,
            pair_order=self.pair_order,
            with_teacher=self.has_teacher,
            grid=self.grid,
            seq_multiple=token_multiple(unwrapped(self.chunks[0]).config),
        )

    def forward_backward(self, batch: PackedBatch) -> schedule.StepOutput | None:
        """Gradients of the batch in ``main_grad``; None where no replica has a response to train on."""
        with self.phases("train"), contextlib.suppress(schedule.NoResponseTokens):
            self.sampler.sleep()
            if not self._checked:
                self._check_identity()
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with self.teacher.on_device() as teacher:
                return self._schedule(
                    batch, teacher if self.has_teacher else None, self._token_loss(), token_weights=self._token_weights
                )
        return None

    def update(self, output: schedule.StepOutput | None) -> dict[str, float]:
        """Check the numbers, apply the gradient, move the teacher; returns the step's metrics, equal on all ranks.

        Raises `RunUnhealthy` for a number that is not finite; the gradient is then not applied.
        """
        if output is None:
            return {}
        if self.config.logged:
            metrics = turn_metrics(output, self._turns, self._token_weights is not None, self.grid)
            metrics |= step_metrics(replace(output, weights=None), None, self.grid)
        else:
            metrics = step_metrics(output, self._sampler_log_probs, self.grid, self.config.loss.rollout_correction_cap)
        if self.config.shows_contents and self.config.metrics.samples_due(self.step + 1):
            self._show_samples(output)
        if not self._checked:
            self._checked = True
            if self.has_teacher and self.step == 0:
                check_teacher_canary(metrics["teacher_cross_entropy"], self.config.guards.max_teacher_cross_entropy)
        with self.phases("optimizer"):
            metrics["gradient_norm"] = gradient_norm(self.optimizer)
            self.guards.check_finite(self.step + 1, metrics)
            self.scheduler.step(1)
            metrics["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
            apply_gradients(self.optimizer, metrics["gradient_norm"])
            self.teacher.update(self.optimizer)
        if self.config.target.rule == "batch" and self.has_teacher:
            entropies, bound = batch_entropies(output, self.grid), self._target().k_bound
            self.batch_k = solve_batch_k(*entropies, bound, max_entropy=math.log(self.run_data.vocab_size))
        return metrics

    def finish_step(self, metrics: dict[str, float], responses: Sequence[Response], batch: PackedBatch) -> None:
        """Count the step; log, evaluate, guard and save what is due.

        Raises `RunUnhealthy` where a guard trips, `CheckpointError` where the run folder belongs to another run now."""
        self._require_folder()
        self.step += 1
        metrics |= rollout_metrics(responses, self.grid, batch) | self.rollouts.finish_step()
        timed = self.phases.metrics(rollout=metrics["tokens/rollout"], train=self._tokens_read(batch, metrics))
        self.log.log(self.step, metrics | timed)
        warning = warning_of_a_silent_teacher(metrics, self.config.target.teacher_weight) if self.step == 1 else None
        if warning is not None:
            self.log.message(warning)
        self.guards.check(self.step, metrics)
        last = self.step == self.config.num_steps
        if self.config.evaluation.every and (self.step % self.config.evaluation.every == 0 or last):
            self.evaluate()
        if last or (self.config.checkpoint.save_every and self.step % self.config.checkpoint.save_every == 0):
            self.save()
        self.checkpointer.poll()

    def leave(self) -> None:
        """End before the last step, as asked: a checkpoint of the present step, and the mark that it lies there."""
        if self._saved_step != self.step:
            self.save()
        self._require_folder()
        self.checkpointer.finish()
        self.stop.leave_marker(self.step)
        checkpoint = self.checkpoint if self.step else None
        self.log.message(next_steps.stopped(self.step, self.config.num_steps, self.stop.reason, checkpoint))

    # -- beside the loop -----------------------------------------------------------------------------------------

    def evaluate(self, hinted: bool = False, num_transcripts: int | None = 4) -> EvaluationResult:
        """Held-out problems, without hints unless ``hinted``; logged under the present step.  ``num_transcripts``:
        problems whose responses are kept as text; None keeps all."""
        self.rollouts.send_weights(self.step)
        with self.phases("evaluation"):
            result = evaluate(
                self.sampler,
                self.run_data.builder,
                self.run_data.tokenizer,
                self.run_data.evaluation,
                load_verifier(self.config.evaluation.verifier),
                params=self.sampling,
                num_samples=self.config.evaluation.num_samples,
                ks=self.config.evaluation.pass_at_k,
                seed=self.config.seed,
                step=self.step,
                grid=self.grid,
                max_length=self.run_data.max_length,
                hinted=hinted,
                num_transcripts=num_transcripts,
            )
        if result.overlooked is not None:
            for line in result.overlooked.lines(self.config.evaluation.verifier, self.run_data.builder.show_contents):
                self.log.message(line)
        self.log.log_evaluation(self.step, result.metrics("evaluation_hinted" if hinted else "evaluation"))
        return result

    def measure(self, problems: Sequence[Problem], responses: Sequence[Response]) -> dict[str, float]:
        """The metrics of these responses (one per problem) under the present weights, student and teacher; nothing is
        trained.  Entropies are the student's own, at temperature 1, at every response token."""
        contexts = build_contexts([self.rollouts.prompts(problem) for problem in problems], responses)
        batch = self.pack_contexts(contexts)
        with self.teacher.on_device() as teacher:
            output = self._schedule(batch, teacher, self._distillation_loss(self._target()), forward_only=True)
        return step_metrics(output, self._on_device(response.log_probs for response in responses), self.grid)

    def save(self) -> None:
        """A checkpoint of the present step.  In the middle of one, the step is redone from there."""
        self._require_folder()
        with self.phases("checkpoint"):
            self._restore_folder()
            self.checkpointer.save(
                self.step,
                chunks=self.chunks,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                teacher=self.teacher if self.has_teacher else None,
                trainer_state={
                    **self.rollouts.state_dict(),
                    "guards": self.guards.state_dict(),
                    "batch_k": self.batch_k,
                    CONFIGURATION: stored_values(self.config),
                },
                args=megatron_args(self.chunks[0], replace(self.config.model, vocab_size=self.run_data.vocab_size)),
            )
        self._saved_step = self.step

    def _restore_folder(self) -> None:
        """Write again what a launch writes once, where somebody has removed the run folder in the meantime."""
        if self.grid.is_reporter and not self.folder.is_whole():
            logger.warning("%s is not there any more: it is written again", hidden(str(self.folder.path)))
            self.folder.write()

    def close(self) -> None:
        """Finish saves in the background, end the sampler's engines, close the logs."""
        self.sampler.close()
        if self._owns_folder:
            self.checkpointer.finish()
        self.log.close()

    @property
    def checkpoint(self) -> Path:
        """The folder of the present step's checkpoint."""
        return self.checkpointer.folder / iteration_name(self.step)

    def _require_folder(self) -> None:
        """Raise `CheckpointError` on all ranks where another run has taken the run folder over.  Collective."""
        if self._prove_ownership is not None:
            try:
                on_rank_0(self._prove_ownership)
            except CheckpointError:
                self._owns_folder = False
                raise

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher; the baselines train on next tokens."""
        return self.config.objective == "self_distillation"

    # -- building ------------------------------------------------------------------------------------------------

    def _build_model(self) -> None:
        config, grid = self.config, self.grid

        def initial_chunks() -> list[torch.nn.Module]:
            return new_chunks(config, grid, self.run_data.vocab_size)

        self.chunks = wrap_for_training(initial_chunks(), config.optimizer)
        last = unwrapped(self.chunks[-1])
        self.output_layer = decided_output_layer(config, self.chunks)
        self.vocab = VocabShard.from_group(last.vocab_size, self.run_data.vocab_size, grid.tp_group)
        vocab_size, verify = self.run_data.vocab_size, config.checkpoint.verify
        load = None if self.resumed_from is not None else config.checkpoint.load
        if load is not None and not config.checkpoint.load_optimizer:
            load_weights(Path(load), self.chunks, vocab_size, verify)
        self.optimizer, self.scheduler = build_optimizer(self.chunks, config.optimizer, config.num_steps)
        if load is not None and config.checkpoint.load_optimizer:
            load_weights_and_optimizer(Path(load), self.chunks, self.optimizer, vocab_size, verify)
        self.teacher = Teacher(
            config.teacher.weights if self.has_teacher else "current",
            self.chunks,
            initial_chunks,
            ema_decay=config.teacher.ema_decay,
            offload=config.teacher.offload == "cpu",
        )
        self.sampler: Sampler
        if config.logged:  # nothing is sampled but for evaluations, where there are any
            self.sampler = OnDemandSampler(lambda: make_sampler(config, self.run_data, self.chunks, grid))
        else:
            self.sampler = make_sampler(config, self.run_data, self.chunks, grid)
        self.rollouts = Rollouts(config, self.run_data, grid, self.sampler, self.phases, self._learnabilities)

    def _wants_all_turns_read(self) -> bool:
        """A dry run reports them all, and an error is found before the first step; else each step reads its own."""
        return self.config.dry_run or turn_reader(self.config, self.run_data).has_errors

    def _loss_backend(self) -> str:
        """What computes the loss, and why, for the log; raises `ConfigError` where what is configured cannot."""
        dtype = torch.bfloat16 if self.config.optimizer.precision == "bf16" else torch.float32
        try:
            name, why = in_use(self.config.loss.backend, self.grid.device, dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return f"{'Triton kernels' if name == 'triton' else 'PyTorch'} ({why})"

    def _resumption(self) -> Resumption | None:
        """What the run continues from; None for a new one.  Raises `ConfigError` where it may not continue."""
        latest = self.checkpointer.latest()
        if latest is None:
            return None
        if not self.config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume=false, but {self.run_dir} holds {latest.name} of an earlier run: "
                "choose another run_dir, or let it resume"
            )
        found = resumption(self.config, self.run_data.problems.fingerprint, self.checkpointer.read(latest))
        if self.grid.is_reporter:
            for line in found.warnings:
                logger.warning("%s", hidden(line))
        return found

    def _resume(self, found: Resumption) -> None:
        self.checkpointer.load(
            found.saved,
            chunks=self.chunks,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            teacher=self.teacher if self.has_teacher else None,
        )
        state = found.saved.trainer_state
        self.step, self.batch_k = state["step"], state["batch_k"]
        if found.same_problems:
            self.rollouts.load_state_dict(state)
        self.guards.load_state_dict(state["guards"])

    # -- what the steps above need -------------------------------------------------------------------------------

    def _schedule(
        self,
        batch: PackedBatch,
        teacher: Sequence[torch.nn.Module] | None,
        token_loss: schedule.TokenLoss | FusedLoss,
        **options: Any,
    ) -> schedule.StepOutput:
        return schedule.run(
            self.chunks,
            teacher,
            batch,
            token_loss,
            self.grid,
            self.vocab,
            pair_order=self.pair_order,
            teacher_store_bytes=self.config.schedule.teacher_store_gb * 2**30,
            **options,
        )

    @property
    def pair_order(self) -> str:
        """As configured; by default teacher_first where there is a pipeline to keep full, else alternating."""
        return self.config.schedule.pair_order or ("teacher_first" if self.grid.pp_size > 1 else "alternating")

    @property
    def sampling(self) -> SamplingParams:
        """How responses are drawn in this step."""
        return sampling_params(self.config, self.run_data, self.batch_k)

    def _target(self) -> Target:
        return configured_target(self.config.target, self.batch_k)

    def _token_loss(self) -> schedule.TokenLoss | FusedLoss:
        return self._distillation_loss(self._target()) if self.has_teacher else schedule.next_token

    def _distillation_loss(self, target: Target) -> schedule.TokenLoss | FusedLoss:
        loss = self.config.loss
        divergence = Divergence(loss.divergence, loss.jsd_lambda)
        return schedule.self_distillation(target, divergence, loss.backend, fusion=self.output_layer.fusion)

    def _learnabilities(self, candidates: Sequence[tuple[Problem, Response]]) -> list[float]:
        self.sampler.sleep()
        with self.teacher.on_device() as teacher:
            return learnabilities(
                candidates,
                builder=self.run_data.builder,
                student=self.chunks,
                teacher=teacher,
                grid=self.grid,
                vocab=self.vocab,
                max_tokens=self.config.schedule.max_tokens,
                fusion=self.output_layer.fusion,
                backend=self.config.loss.backend,
                policy=self.config.data.on_long_context,
                alpha=self.config.solutions.alpha,
                max_length=self.run_data.max_length,
                max_new_tokens=self.config.rollout.max_new_tokens,
            )

    def _check_identity(self) -> None:
        """One prompt read twice by the same weights has no loss: sharding, packing and exchange work in this layout."""
        if not self.has_teacher or self.config.guards.identity_tolerance is None:
            return
        answered = [context for context in self._contexts if context.response]
        same = [replace(c, teacher_prompt=c.student_prompt) for c in answered[:IDENTITY_CONTEXTS]]
        batch = self.pack_contexts(same)
        token_loss = self._distillation_loss(Target(teacher_weight=self.config.target.teacher_weight))
        output = self._schedule(batch, self.chunks, token_loss, forward_only=True)
        check_identity(step_metrics(output, None, self.grid)["loss/mean"], self.config.guards.identity_tolerance)

    def _on_device(self, log_probs: Iterable[Sequence[float]]) -> torch.Tensor:
        """Return ``log_probs``, one sequence per response, as [R_total] float64 in the order of
        ``PackedBatch.response_tokens``; the host does not wait for the copy."""
        joined = torch.tensor([value for values in log_probs for value in values], dtype=torch.float64)
        return to_device_in_one_copy(joined, self.grid.device)

    def _show_samples(self, output: schedule.StepOutput) -> None:
        """Log some responses of the step under way with the loss's numbers of their tokens: those of the first problems
        of the first replica, whose ranks gather the numbers; the other replicas do nothing."""
        if self.grid.dp_rank != 0:
            return
        shown = chosen(self._contexts, self.config.metrics.show_samples)
        if not shown:
            return
        numbers = token_numbers(output, [span for _, span in shown], self.grid)
        self.log.log_samples(
            self.step + 1,
            lambda: [
                sample_of(context, self.rollouts.solution_read(context), known, self.run_data.tokenizer)
                for (context, _), known in zip(shown, numbers, strict=True)
            ],
        )

    def _tokens_read(self, batch: PackedBatch, metrics: dict[str, float]) -> float:
        """Tokens, without padding, that student and teacher read in this step, over the global batch."""
        streams = [(batch.student, metrics["padding/student"])]
        if self.has_teacher:
            streams.append((batch.teacher, metrics["padding/teacher"]))
        return sum(self.grid.dp_size * len(s) * batch.seq_length * (1 - padding) for s, padding in streams)
