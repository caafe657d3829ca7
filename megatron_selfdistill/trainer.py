# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of a run, and the stages of a step as methods that take and return values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_selfdistill.commands.installation import require_extra

require_extra(__name__, "train")  # before the imports that need these packages

from megatron_selfdistill.checkpoint.checkpointer import Checkpointer
from megatron_selfdistill.checkpoint.formats.directory import iteration_name
from megatron_selfdistill.checkpoint.formats.megatron_args import megatron_args
from megatron_selfdistill.checkpoint.formats.saved_run import CONFIGURATION
from megatron_selfdistill.checkpoint.resumption import PROMPTS, Resumption, latest_resumption, with_warmup
from megatron_selfdistill.checkpoint.run_directory import RunDirectory
from megatron_selfdistill.checkpoint.trained_weights import trained_weights
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.bound_keys import stored_values
from megatron_selfdistill.config.due import checkpoint_due, evaluation_due, samples_due, tokens_measured
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.controls import with_decided_target
from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.stop import Stop
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult
from megatron_selfdistill.evaluation.held_out import EvaluationOptions, evaluate
from megatron_selfdistill.evaluation.verify import load_verifier
from megatron_selfdistill.learner import Learner
from megatron_selfdistill.metrics.first_checks import check_identity, check_teacher_canary
from megatron_selfdistill.metrics.guards import Guards
from megatron_selfdistill.metrics.leakage import leak_counts, telling_words
from megatron_selfdistill.metrics.log import configured_log
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.run_log import EventLog
from megatron_selfdistill.metrics.samples import step_samples
from megatron_selfdistill.metrics.step import rollout_metrics
from megatron_selfdistill.metrics.step_warnings import step_warnings
from megatron_selfdistill.model.output_layer import loss_backend
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.joined_batches import joined_output
from megatron_selfdistill.pipeline.partial_batches import PartialBatch
from megatron_selfdistill.pipeline.placement import placement_everywhere
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.factory import engines_of
from megatron_selfdistill.sources.configured_source import (
    checked_run_data,
    configured_sampler,
    configured_source,
    evaluation_player,
    step_sampling,
)
from megatron_selfdistill.sources.learner_readings import LearnerReadings, identity_loss
from megatron_selfdistill.sources.moved_contexts import moved
from megatron_selfdistill.sources.source import StepBatch


class AccumulatedBatch(NamedTuple):
    """A batch whose gradients are in ``main_grad``: the whole step, or one partial batch of it."""

    batch: StepBatch
    packed: PackedBatch
    output: StepOutput | None
    """The statistics of its tokens; None if no replica had a response to train on."""


Hook = Callable[["Trainer", Mapping[str, float]], None]
"""A function of the trainer and the metrics of a finished step, which every rank calls; it may be a collective."""


class Trainer:
    """Learner, source of responses, data, checkpoints and logs of one rank.

    Every rank of the world makes the same calls in the same order.  A step is a chain of values: no stage keeps
    anything for the next one.  Three stages change something: `forward_backward` the gradients, `update` the learner,
    ``sampling`` and ``checked``, `finish_step` the ``step``, the state of the source, guards, log and checkpoints.
    """

    def __init__(
        self, config: Config, run_data: RunData, grid: RankGrid, prove_ownership: Callable[[], None] | None = None
    ) -> None:
        """Build the parts of a run, and resume the run where its directory has a checkpoint.

        ``prove_ownership``: called on rank 0 before the run directory is written; raises `CheckpointError` where
        another run has taken the directory over (`RunLock.renew`).
        Raises: `ConfigError`, `CheckpointError`.
        """
        config = with_decided_target(config, run_data.problems.problems)
        self.config, self.grid, self.run_dir = config, grid, Path(config.run_dir)
        self.loss_backend = loss_backend(config, grid)
        self.phases = Phases(grid.device)
        self.checkpointer = Checkpointer(self.run_dir, grid, config.checkpoint, prove_ownership)
        found = latest_resumption(config, run_data, self.checkpointer, grid)
        self.resumed_from = found.saved.path if found is not None else None
        self.changes = found.changes if found is not None else ()  # of configuration and prompts, for the log
        self.run_data = run_data if found is not None else checked_run_data(config, run_data, grid)
        saved = found.saved if found is not None else None
        trained = trained_weights(config, saved)
        self.learner = Learner(with_warmup(config, found), self.run_data, grid, saved=saved, trained=trained)
        chunks, weights = self.learner.chunks, self.learner.teachers.role_weights
        self.sampler = configured_sampler(config, self.run_data, chunks, grid, self.phases, weights)
        readings = LearnerReadings(self.learner)
        self.source = configured_source(config, self.run_data, grid, self.sampler, self.phases, readings)
        falls, samples = config.needs.loss_should_fall, config.student_samples
        self.guards = Guards(
            config.guards,
            engines_of(config),
            loss_should_fall=falls,
            student_samples=samples,
            has_one_horizon=config.rollout.has_one_horizon,
        )
        self.leak_words = telling_words(config.metrics.leak_words, run_data.problems.problems)
        self.step = 0
        """Optimizer steps done."""
        self.checked = False
        """Whether this launch has checked the identity law and the teacher's canary."""
        if found is not None:
            self._resume(found)
        self.sampling = step_sampling(config, self.run_data, self.learner.batch_k)
        """The parameters with which the next step samples responses."""
        self.run_directory = RunDirectory(config, self.step, prove_ownership)
        self.saved_step = self.step  # a run that starts anew needs no checkpoint of step 0
        self.log = configured_log(config, self.phases, enabled=grid.is_reporter)
        self.events = EventLog(self.run_dir, enabled=grid.is_reporter and not config.dry_run)
        if not config.dry_run:  # a dry run writes nothing: another run may be using the directory
            with raise_on_all_ranks():  # a logger that cannot start ends all ranks alike
                self.log.resume(self.step)
        self.before_gradients: list[Callable[[Trainer, StepBatch], None]] = []
        """Instruments that read the first batch of a step under the weights that have generated it; collective."""
        self.after_step: list[Hook] = [judge, evaluate_when_due]
        """What looks at the run after each step, in this order; `train.train` adds instruments to both lists."""
        self.stop = Stop(
            None if config.dry_run else self.run_dir,
            grid,
            time_limit_minutes=config.stop.time_limit_minutes,
            margin_minutes=config.stop.margin_minutes,
        )

    # -- the stages of a step, in the order of the loop ----------------------------------------------------------

    def next_batch(self) -> StepBatch:
        """Return all responses of the next step in one batch, sampled with the current weights; see `batches`."""
        return self.source.next_step(self.step, self.sampling)

    def batches(self) -> Iterator[StepBatch]:
        """Yield the responses of the next step, sampled with the current weights where anything is sampled.

        They come in one batch, or in partial batches, one for each teacher.
        Raises: `EngineError` on all ranks where an engine failed; a checkpoint saved then redoes the step.
        """
        return self.learner.teachers.batches(self.next_batch())

    def balance(self, batch: StepBatch) -> StepBatch:
        """Return the batch with contexts moved among replicas to shorten the step.  Collective."""
        if self.grid.dp_size == 1:
            return batch
        with self.phases("pack"):
            return moved(batch, placement_everywhere(batch.contexts, self.learner.packing, self.grid), self.grid)

    def pack(self, batch: StepBatch) -> PackedBatch:
        """Return both contexts of every response as microbatches: equal in number and length on all replicas."""
        with self.phases("pack"):
            return self.learner.pack(batch.contexts, batch.teacher)

    def forward_backward(
        self, batch: StepBatch, packed: PackedBatch, earlier: Sequence[AccumulatedBatch] = ()
    ) -> AccumulatedBatch:
        """Add the gradients of the batch to ``main_grad``; there are none where no replica has a response to train on.

        ``earlier``: the step's batches before this one, whose gradients stay; without them, gradients start at zero.
        The first batch of a launch is also read twice by the same weights: see `check_identity`.
        Raises: `RunUnhealthy` where this check fails.
        """
        output, part = None, partial_batch_of(batch, earlier)
        every, tolerance = tokens_measured(self.config, self.step + 1), self.config.guards.start.identity_tolerance
        if not earlier:
            for hook in self.before_gradients:
                hook(self, batch)
        with self.phases("train"), contextlib.suppress(schedule.NoResponseTokens):
            self.sampler.sleep()
            if not self.checked and part.earlier is None and self.config.has_teacher and tolerance is not None:
                check_identity(identity_loss(self.learner, batch.contexts), tolerance)
            output = self.learner.forward_backward(
                packed, batch.token_coefficients, batch.teacher, batch.contexts, measure_every=every, partial_batch=part
            )
        return AccumulatedBatch(batch, packed, output)

    def update(self, step: Sequence[AccumulatedBatch]) -> dict[str, float]:
        """Check the numbers, apply the gradient, move the teacher; return the metrics so far, equal on all ranks.

        Raises: `RunUnhealthy` for a number that is not finite; the gradient is then not applied.
        """
        batch, output = joined(step)
        if output is None:
            return {}
        metrics = self.source.metrics(batch, output)
        if self.learner.teachers.names:
            metrics |= self.learner.teachers.metrics([(it.batch.teacher, it.output) for it in step if it.output])
        if self.config.shows_contents and samples_due(self.config, self.step + 1):
            pairs = zip(batch.contexts, batch.solutions, strict=bool(batch.solutions))
            seen = [(context, self.learner.teachers.seen_hint(context, solution)) for context, solution in pairs]
            lacks_teacher = self.config.has_teacher and not self.learner.target.reads_teacher
            read = partial(self._read, step) if lacks_teacher else None
            count = self.config.metrics.show_samples
            shown = step_samples(output, seen, count, self.run_data.tokenizer, self.grid, read)
            self.log.log_samples(self.step + 1, shown)
        if not self.checked and self.config.has_teacher and self.step == 0:
            check_teacher_canary(metrics["teacher_cross_entropy"], self.config.guards.start.max_teacher_cross_entropy)
        self.checked = True
        with self.phases("optimizer"):
            metrics["gradient_norm"] = self.learner.gradient_norm()
            self.guards.check_finite(self.step + 1, metrics)
            metrics["learning_rate"] = self.learner.apply_gradients(metrics["gradient_norm"])
        if self.config.target.rule == "batch" and self.config.has_teacher:
            self.learner.solve_k(output)
            self.sampling = step_sampling(self.config, self.run_data, self.learner.batch_k)
        return metrics

    def _read(self, step: Sequence[AccumulatedBatch], contexts: Sequence[ContextPair]) -> StepOutput | None:
        """Return the statistics of some contexts of the ``step``, which all models read once more.  Collective.

        None where no replica names a context with a response.
        """
        read: list[tuple[StepOutput, int]] = []
        for batch in (one.batch for one in step):
            own = [context for context in contexts if any(context is it for it in batch.contexts)]
            with self.phases("train"), contextlib.suppress(schedule.NoResponseTokens):
                output = self.learner.measure(own, teacher=batch.teacher)
                read.append((output, sum(len(context.response) for context in own)))
        return joined_output(*zip(*read, strict=True)) if read else None

    def finish_step(self, step: Sequence[AccumulatedBatch], metrics: Mapping[str, float]) -> None:
        """Count the step, commit its batches, log its metrics, call ``after_step``, and save if a checkpoint is due.

        Raises: `RunUnhealthy` if a guard fails, `CheckpointError` if the run directory now belongs to another run.
        """
        self.run_directory.require_ownership()
        self.step += 1
        batch = StepBatch.joined([one.batch for one in step])
        self.source.commit(batch)
        metrics = self._completed(metrics, batch, [one.packed for one in step])
        self.log.log(self.step, metrics)
        for hook in self.after_step:
            hook(self, metrics)
        if checkpoint_due(self.config, self.step):
            self.save()
        if self.config.checkpoint.async_save:
            self.checkpointer.poll()

    def _completed(
        self, metrics: Mapping[str, float], batch: StepBatch, packs: Sequence[PackedBatch]
    ) -> dict[str, float]:
        """Return the ``metrics`` of a step with those of its responses, its tokens and its time.  Collective."""
        own, has_teacher = batch.contexts[self.grid.replica_rank :: self.grid.replica_size], self.config.has_teacher
        leaks = leak_counts(own, self.leak_words, self.run_data.tokenizer) if has_teacher else None
        rollout = rollout_metrics(batch.responses, self.grid, packs, leaks, has_teacher=has_teacher)
        metrics = {**metrics, **rollout, **batch.metrics, **self.sampler.metrics()}
        metrics["data/epoch"] = self.source.state.problem_sampler.epochs
        return metrics | self.phases.metrics(rollout=metrics["tokens/rollout"], train=metrics["tokens/read"])

    # -- beside the loop -----------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The directory of the present step's checkpoint."""
        return self.checkpointer.directory / iteration_name(self.step)

    def evaluate(self, hinted: bool = False, num_transcripts: int | None = 0) -> EvaluationResult:
        """Evaluate on held-out problems, without hints unless ``hinted``, and log the result under the present step.

        ``num_transcripts``: the problems whose responses are all kept as text; None keeps all.  Without hints, the
        result also has the responses to report.num_problems that go to evaluation_samples.jsonl.
        """
        options = EvaluationOptions.configured(
            self.config,
            self.sampling,
            self.step,
            hinted,
            num_transcripts=num_transcripts,
            num_shown=self.config.report.num_problems if self.config.shows_contents and not hinted else 0,
            leak_words=self.leak_words,
        )
        verifier = load_verifier(self.config.evaluation.verifier)
        self.sampler.update_weights(self.step)
        own = evaluation_player(self.config, self.run_data, self.sampler, self.step, self.grid)
        with self.phases("evaluation"), own as player:
            result = evaluate(self.sampler, self.run_data, verifier, options, self.grid, player)
        if result.overlooked is not None:
            for line in result.overlooked.lines(self.config.evaluation.verifier, self.run_data.builder.show_contents):
                self.log.message(line)
        self.log.log_evaluation(self.step, result.metrics("evaluation_hinted" if hinted else "evaluation"))
        self.log.log_evaluation_samples(self.step, result.records(options.num_shown))
        return result

    def measure(self, batch: StepBatch) -> dict[str, float]:
        """Return the metrics of a batch under the present weights, at temperature 1, and train nothing.  Collective."""
        return self.source.metrics(batch, self.learner.measure(batch.contexts, teacher=batch.teacher))

    def save(self) -> None:
        """Save a checkpoint of the present step; a resumed run redoes a step that was not finished."""
        self.run_directory.require_ownership()
        with self.phases("checkpoint"):
            if self.grid.is_reporter:
                self.run_directory.restore()
            model = replace(self.config.model, vocab_size=self.run_data.vocab_size)
            state = {**self.source.state_dict(), "guards": self.guards.state_dict(), "batch_k": self.learner.batch_k}
            state[CONFIGURATION] = stored_values(self.learner.config)  # with a number for the warm-up
            state[PROMPTS] = self.run_data.prompts_digest
            state |= self.learner.teachers.state_dict()
            args = megatron_args(self.learner.chunks[0], model)
            self.checkpointer.save(self.step, **self.learner.stored_parts, trainer_state=state, args=args)
        self.saved_step = self.step
        self.events.record(self.step, "saved", checkpoint=str(self.checkpoint))

    def leave(self) -> None:
        """End before the last step, on request: save a checkpoint of the present step, and leave a marker."""
        if self.saved_step != self.step:
            self.save()
        self.run_directory.require_ownership()
        self.checkpointer.finish()
        self.stop.leave_marker(self.step)
        self.events.record(self.step, "stopped", reason=self.stop.reason)
        where, then = "before step 1", "no step was done; the same command starts anew"
        if self.step:
            where = f"after step {self.step}"
            then = f"started again, the same command continues; checkpoint: {self.checkpoint}"
        self.log.message(f"stopped {where} of {self.config.num_steps}: {self.stop.reason}; {then}")

    def close(self) -> None:
        """Finish saves in the background, end the sampler's engines, close the logs."""
        self.sampler.close()
        if self.run_directory.is_owned:
            self.checkpointer.finish()
        self.log.close()

    # -- what the methods above need -----------------------------------------------------------------------------

    def _resume(self, found: Resumption) -> None:
        self.checkpointer.load(found.saved, **self.learner.stored_parts)
        state = found.saved.trainer_state
        self.step = state["step"]
        self.learner.set_batch_k(state["batch_k"])
        if found.same_problems:
            self.source.load_state_dict(state)
        self.guards.load_state_dict(state["guards"])


def judge(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log what the metrics of a step warn of, and raise `RunUnhealthy` on all ranks if they break a guard."""
    of_step, method = step_warnings(trainer.config, trainer.step, metrics), trainer.source.state.method
    of_method = method.warnings(metrics) if method.warnings is not None else []
    for warning in (*of_step, *of_method, *trainer.guards.warnings(metrics)):
        trainer.log.message(warning)
    trainer.guards.check(trainer.step, metrics)


def evaluate_when_due(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Evaluate on held-out problems after the steps that the configuration names.  Collective."""
    if evaluation_due(trainer.config, trainer.step):
        trainer.evaluate()


def partial_batch_of(batch: StepBatch, earlier: Sequence[AccumulatedBatch]) -> PartialBatch:
    """Return the place of ``batch`` in its step, after the ``earlier`` batches."""
    outputs = [one.output for one in earlier if one.output is not None]
    return PartialBatch(outputs[-1].accumulated if outputs else None, batch.share, batch.ends_step, batch.next_teacher)


def joined(step: Sequence[AccumulatedBatch]) -> tuple[StepBatch, StepOutput | None]:
    """Return all batches of a step as one, and their statistics; no statistics where nothing was trained on."""
    batch = StepBatch.joined([one.batch for one in step])
    used = [(one.output, len(one.packed.response_tokens)) for one in step if one.output is not None]
    if not used:
        return batch, None
    if len(used) == 1:
        return batch, used[0][0]
    return batch, joined_output([output for output, _ in used], [num_tokens for _, num_tokens in used])
