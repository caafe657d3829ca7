# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The learner on one rank: student, teacher, reference and optimizer, and the loss between student and target.

The step of the optimizer has two halves, so that a run can check the norm of the gradient in between.

    norm = gradient_norm(optimizer)        # prepares the gradients
    ...                                    # a guard may refuse to apply them
    apply_gradients(optimizer, norm)

``optimizer.step()`` would prepare the gradients and compute their norm a second time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.checkpoint.external import load_first_adapters, load_weights, load_weights_and_optimizer
from megatron_selfdistill.checkpoint.frozen_weights import AdapterBase
from megatron_selfdistill.checkpoint.teacher_directories import (
    TeacherCopy,
    about_architecture,
    adapter_teachers,
    load_adapter_teacher,
    load_teacher,
    teacher_copies,
    teacher_directories,
)
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.teachers_config import NamedTeacher, factors_of
from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.data.packing import PackedBatch
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.host_to_device import to_device_in_one_copy
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, in_use
from megatron_selfdistill.loss.target import Divergence, Target, solve_batch_k
from megatron_selfdistill.metrics import batch_entropies, step_metrics
from megatron_selfdistill.model.adapters import add_adapters
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_on_meta, build_optimizer, new_chunks, wrap_for_training
from megatron_selfdistill.model.forward import FusedLoss, decided_output_layer, output_weight, unfusable, unwrapped
from megatron_selfdistill.named_teachers import AdapterTeacher, NamedTeachers, require_host_memory
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.pipeline.schedule import Reference
from megatron_selfdistill.pipeline.score import (
    Reading,
    ScoringModels,
    Want,
    candidate_log_probs,
    learnabilities,
    log_probs,
    read,
)
from megatron_selfdistill.pipeline.token_losses import PartialBatch, StepOutput, TokenMeasurement
from megatron_selfdistill.rollout.base import Response, RoleWeights
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.signals import MEASURED_SIGNALS
from megatron_selfdistill.teacher import Chunks, Teacher

IDENTITY_CONTEXTS = 8
"""Contexts per replica that `Learner.identity_loss` reads."""


class TargetModels(NamedTuple):
    """The chunks of the models that a target mixes with or without the student, on the device of this rank."""

    teacher: Sequence[torch.nn.Module]
    reference: Sequence[torch.nn.Module] | None
    """The teacher's own chunks where one frozen copy serves as both; None without target.anchor=reference."""


class Learner:
    """Student, teacher, reference and optimizer of one rank.

    Every rank of the world makes the same calls in the same order.  `forward_backward` changes gradients only;
    `apply_gradients` changes the weights, the optimizer with its schedule, and the teacher; `set_batch_k` changes
    ``batch_k``, ``target`` and ``distillation_loss``.
    """

    def __init__(
        self, config: Config, run_data: RunData, grid: RankGrid, *, resumes: bool, base: AdapterBase | None = None
    ) -> None:
        """Build the model with the weights of ``checkpoint.load``, or random weights where that is null.

        ``resumes``: the caller loads a checkpoint of the run afterwards, so that ``checkpoint.load`` is not read.
        ``base``: the result of `adapter_base`, whose weights are always read; None for a run without adapters.
        Raises: `ConfigError`, `CheckpointError`.
        """
        self.config, self.run_data, self.grid, self.base = config, run_data, grid, base

        def initial_chunks() -> list[torch.nn.Module]:
            return new_chunks(config, grid, run_data.vocab_size)

        adapted, offload = list(adapter_teachers(config)), config.teacher.offload == "cpu"
        copies, initial = teacher_copies(config), initial_chunks()
        self._require_room_for_teachers(copies, initial)
        load = Path(config.checkpoint.load) if config.checkpoint.load is not None and not resumes else None
        weights_alone = None if config.checkpoint.load_optimizer else load
        if base is not None:
            weights_alone = base.load
        if weights_alone is not None:
            load_weights(weights_alone, initial, run_data.vocab_size, config.checkpoint.verify)
        if base is not None:
            add_adapters(initial, base.settings, grid)
            if config.adapter.load is not None and not resumes:
                load_first_adapters(config, base, initial)
        self.chunks = wrap_for_training(initial, config.optimizer)
        self.output_layer = decided_output_layer(config, self.chunks)
        last = unwrapped(self.chunks[-1])
        self._width = last.config.hidden_size
        self.teacher_names = list(config.named_teachers)
        """The names of the teachers of the key ``teachers``."""
        self.joins_teachers = config.joins_teachers
        """Whether several teachers of a record teach as their product."""
        self._teachers = config.named_teachers or {"": NamedTeacher()}
        if self.joins_teachers:
            with raise_on_all_ranks():
                _require_weight_alone(last)
        self.vocab = VocabShard.from_group(last.vocab_size, run_data.vocab_size, grid.tp_group)
        self.optimizer, self.scheduler = build_optimizer(self.chunks, config.optimizer, config.num_steps)
        if load is not None and config.checkpoint.load_optimizer:
            load_weights_and_optimizer(load, self.chunks, self.optimizer, run_data.vocab_size, config.checkpoint.verify)
        keeps_start = config.keeps_teacher and (config.keeps_start or bool(adapted))
        weights = config.teacher.weights if keeps_start else "current"
        self.teacher = Teacher(
            weights,
            self.chunks,
            initial_chunks,
            ema_decay=config.teacher.ema_decay,
            offload=offload,
            adapted=config.adapter.rank > 0,
        )
        self.reference: Teacher | None = None
        """The initial weights that the target is anchored to: the teacher itself if it is frozen, else another copy."""
        if config.is_anchored:
            is_teacher = weights == "frozen"
            self.reference = (
                self.teacher
                if is_teacher
                else Teacher("frozen", self.chunks, initial_chunks, offload=offload, adapted=config.adapter.rank > 0)
            )
        self.other_widths: dict[str, int] = {}
        """The hidden size of each teacher that has another architecture than the student."""
        self._frozen_copies: list[NamedTeachers] = []
        self._named_weights = self._named_teachers(copies, adapted)
        """The weights of each teacher that has weights of its own, by name."""
        self.packing = self._packing_of(unwrapped(self.chunks[0]).config)
        """How the contexts of a step become microbatches."""
        self.set_batch_k(None)
        self.release_gradients()

    def _require_room_for_teachers(self, copies: Sequence[TeacherCopy], initial: Sequence[torch.nn.Module]) -> None:
        """Raise `ConfigError` where a teacher's model cannot be built, or a node has no room for the teachers' weights.

        ``initial``: the student.
        """
        config = self.config
        resting: dict[str, Sequence[torch.nn.Module]] = {}
        for model, directories in copies:
            chunks: Sequence[torch.nn.Module] = initial
            if model is not config.model:
                with about_architecture(f"teachers.{', '.join(directories)}"):
                    transformer = transformer_config(model, config.parallel, config.optimizer, config.schedule)
                    chunks = build_on_meta(model, transformer, self.grid, self.run_data.vocab_size)
            if config.teacher.offload == "cpu" or len(directories) > 1:
                resting |= dict.fromkeys(directories, chunks)
        require_host_memory(resting)

    def _named_teachers(self, copies: Sequence[TeacherCopy], adapted: Sequence[str]) -> dict[str, RoleWeights]:
        """Load the named teachers; ``adapted``: the names of those that are adapters on the start."""
        config, vocab_size, run_dir = self.config, self.run_data.vocab_size, Path(self.config.run_dir)
        offload = config.teacher.offload == "cpu"
        found: dict[str, RoleWeights] = {}

        def load(path: Path, chunks: Chunks) -> None:
            load_teacher(path, chunks, vocab_size, run_dir, config.checkpoint.verify)

        for name in adapted:
            on_start = load_adapter_teacher(teacher_directories(config)[name], self.teacher.chunks, config, self.grid)
            rests = offload or len(adapted) > 1
            teacher = AdapterTeacher(on_start, device=self.grid.device, rests=rests)
            found[name] = RoleWeights(("teacher",), teacher.chunks, teacher.on_device)
        for model, directories in copies:
            build = partial(new_chunks, config, self.grid, vocab_size, model)
            copy = NamedTeachers(directories, build, load, offload=offload)
            self._frozen_copies.append(copy)
            for name in directories:
                found[name] = RoleWeights(("teacher",), copy.chunks, partial(copy.on_device, name))
            if model is not config.model:
                self.other_widths |= dict.fromkeys(directories, unwrapped(copy.chunks[0]).config.hidden_size)
        return found

    @property
    def has_teacher(self) -> bool:
        """Whether the loss has a teacher; the baselines train on next tokens."""
        return self.config.has_teacher

    @property
    def pair_order(self) -> str:
        """The order of microbatches: as configured, else teacher_first with a pipeline and alternating without."""
        return self.config.schedule.pair_order or ("teacher_first" if self.grid.pp_size > 1 else "alternating")

    def _packing_of(self, model: TransformerConfig) -> Packing:
        return Packing.of_model(
            model,
            max_tokens=self.config.schedule.max_tokens,
            pair_order=self.pair_order,
            with_teacher=self.has_teacher,
            with_reference=self.config.is_anchored,
            joins_turns=self.config.environment.one_sequence,
        )

    @property
    def role_weights(self) -> list[RoleWeights]:
        """The weights, other than the student's, with which a sampler guides responses.

        Without a reference they are the frozen teacher's of a student with adapters, and no weights of another teacher.
        """
        if self.config.rollout.guidance == "none":
            return []
        guide = self._named_weights.get(self.config.guide or "")
        if guide is not None:
            return [guide, *([] if self.reference is None else [_in_roles(self.reference, "reference")])]
        if self.reference is None:
            is_base = self.config.adapter.rank > 0 and self.teacher.weights == "frozen"
            return [_in_roles(self.teacher, "teacher")] if is_base else []
        if self.reference is self.teacher:
            return [_in_roles(self.teacher, "teacher", "reference")]
        reference = _in_roles(self.reference, "reference")
        return [reference] if self.teacher.weights == "current" else [_in_roles(self.teacher, "teacher"), reference]

    @property
    def stored_parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds, as `Checkpointer.save` and `Checkpointer.load` take them."""
        return {
            "chunks": self.chunks,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "teacher": self.teacher if self.config.keeps_teacher else None,
            "reference": self.reference,
            "base": self.base,
        }

    @contextlib.contextmanager
    def target_models(self, named: str = "") -> Iterator[TargetModels]:
        """Yield the chunks of teacher and reference on the device, which offloaded chunks leave at the end.

        ``named``: the teacher's name where the run has the key teachers, else "".
        """
        with contextlib.ExitStack() as stack:
            start = stack.enter_context(self.teacher.on_device())
            teacher: Sequence[torch.nn.Module] = start
            if self._settings_of(named).load is not None:
                stack.enter_context(self._named_weights[named].on_device())
                teacher = self._named_weights[named].chunks
            if self.reference is None or self.reference is self.teacher:
                yield TargetModels(teacher, start if self.reference is self.teacher else None)
            else:
                yield TargetModels(teacher, stack.enter_context(self.reference.on_device()))

    def _settings_of(self, named: str) -> NamedTeacher:
        """Return the settings of a teacher.  Raises: ValueError where no single one of the run reads the contexts."""
        if self._is_product(named):
            return NamedTeacher()  # a product has no entries of its own
        if named not in self._teachers:
            raise ValueError(f"expected contexts of one of the teachers {', '.join(self.teacher_names)}, got {named!r}")
        return self._teachers[named]

    def _is_product(self, named: str) -> bool:
        return (
            self.joins_teachers
            and len(factors_of(named)) > 1
            and all(name in self._teachers for name in factors_of(named))
        )

    def reads_apart(self, named: str) -> bool:
        """Return whether a product of teachers, or a teacher of another architecture, reads in schedules of its own.

        The hidden states then wait for the student.  Other teachers are microbatches of the student's schedule.
        """
        return named in self.other_widths or self._is_product(named)

    def target_of(self, named: str = "") -> Target:
        """Return the target of the tokens that a teacher reads; ``named``: as for `target_models`."""
        weight = self._settings_of(named).weight
        return self.target if weight is None else self.target.with_teacher_weight(weight)

    def pack(self, contexts: Sequence[ContextPair], teacher: str = "") -> PackedBatch:
        """Return the contexts of this replica as microbatches, alike in number and length on all replicas.

        The contexts of teachers that read apart become the student's microbatches alone.  Collective.
        """
        if not self.reads_apart(teacher):
            return pack_everywhere(contexts, self.packing, self.grid)
        prompts = [context.student_prompt for context in contexts]
        return self._pack_alone(prompts, contexts, replace(self.packing, with_teacher=False))

    def _pack_alone(
        self, prompts: Sequence[list[int]], contexts: Sequence[ContextPair], packing: Packing
    ) -> PackedBatch:
        """Return the responses of ``contexts`` after ``prompts`` as the student's microbatches of a step."""
        alone = [replace(it, student_prompt=p, teacher_prompt=p) for it, p in zip(contexts, prompts, strict=True)]
        return replace(pack_everywhere(alone, packing, self.grid), teacher=[])

    def forward_backward(
        self,
        packed: PackedBatch,
        token_coefficients: token_losses.TokenCoefficients | None = None,
        teacher: str = "",
        contexts: Sequence[ContextPair] = (),
        *,
        measure_teacher: bool = True,
        partial_batch: PartialBatch | None = None,
    ) -> StepOutput:
        """Leave the gradients of the batch in ``main_grad``, in place of whatever was there, and return the statistics.

        ``partial_batch``: the place of the batch in a step of several partial batches, whose gradients are added; None
        is the whole step. ``measure_teacher``: whether the step takes the `TokenMeasures`, which with a reference
        include the numbers of the teacher and cost a projection of teacher and reference; without a reference the
        statistics always include the teacher.  ``teacher``: the name of the teacher of all contexts, see
        `target_models`, or of a product.  ``contexts``: those in ``packed``, which the teachers of a product read.
        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        is_first = partial_batch is None or partial_batch.earlier is None
        if is_first:
            for chunk in self.chunks:
                chunk.restore_grad_buffers(synchronize=False)
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        options = {"token_coefficients": token_coefficients, "partial_batch": partial_batch}
        try:
            if not self.has_teacher:
                return self._schedule(packed, None, token_losses.next_token, **options)
            measurement = self._measurement(teacher) if measure_teacher else None
            following = "" if partial_batch is None else partial_batch.next_teacher
            return self._self_distillation(packed, contexts, teacher, measurement, following, **options)
        except schedule.NoResponseTokens:
            if is_first:
                self.release_gradients()
            raise

    def measure(self, contexts: Sequence[ContextPair], *, summarises: bool = False, teacher: str = "") -> StepOutput:
        """Return the distillation loss's statistics of ``contexts`` under the present weights; nothing is trained.

        ``summarises``: whether the measures include the summaries of the logits of all models.  ``teacher``: the name
        of the teacher of all contexts, see `target_models`.
        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        return self._read(contexts, self._measurement(teacher, summarises), teacher).output

    def identity_loss(self, contexts: Sequence[ContextPair]) -> float:
        """Return the mean loss of the first ``contexts`` where the student is its own teacher and reads one prompt.

        With a reference the student is its own reference, too.  The loss is 0 where sharding, packing and exchange work
        in this layout.  Collective.

        Raises: `NoResponseTokens` on all ranks where no replica has a response token.
        """
        answered = [context for context in contexts if context.response][:IDENTITY_CONTEXTS]
        same = [replace(context, teacher_prompt=context.student_prompt) for context in answered]
        anchor = "reference" if self.config.is_anchored else "student"
        target = Target(teacher_weight=self.config.target.teacher_weight, anchor=anchor)
        models = self._models_of_step(self.chunks, self._reference(target, self.chunks))
        output = read(same, models, Want(self._distillation_loss(target))).output
        return step_metrics(output, None, self.grid)["loss/mean"]

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients, unclipped, and prepare them for `apply_gradients`.  Collective."""
        return gradient_norm(self.optimizer)

    def apply_gradients(self, norm: float) -> float:
        """Update the weights with the prepared gradients, clipped by their ``norm``, and then the teacher.

        Returns the learning rate of this update.  `release_gradients` follows the update.  Collective.
        """
        self.scheduler.step(1)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        apply_gradients(self.optimizer, norm)
        if self.teacher.weights == "ema":
            self.teacher.update(self.optimizer)
        self.release_gradients()
        return learning_rate

    def release_gradients(self) -> None:
        """Free the memory of ``main_grad``, whose values are lost, where a vLLM engine samples on this device.

        `forward_backward` takes the memory again.  The host waits for the device.  Elsewhere nothing happens.
        """
        if self.config.samples and self.config.rollout.is_colocated:
            self.optimizer.zero_grad()  # drops views of the gradients
            for chunk in self.chunks:
                chunk.offload_grad_buffers()

    def solve_k(self, output: StepOutput) -> None:
        """Set ``batch_k`` for the next step from the entropies of this step, for target.rule=batch.  Collective."""
        entropies, bound = batch_entropies(output, self.grid), self.target.k_bound
        self.set_batch_k(solve_batch_k(*entropies, bound, max_entropy=math.log(self.run_data.vocab_size)))

    def set_batch_k(self, k: float | None) -> None:
        """Set what the next steps train towards; ``k``: that of target.rule=batch, None before the first step."""
        self.batch_k = k
        self.target = Target.configured(self.config.target, k)
        self.distillation_loss = self._distillation_loss(self.target)

    def learnabilities(
        self, candidates: Sequence[tuple[Problem, Response]], alpha: float, ratio_weight: float
    ) -> list[float]:
        """Return the learnability of each response for the student (pipeline/score.py).  Collective."""
        with self._scoring_models() as models:
            return learnabilities(candidates, models, self.config, self.run_data, alpha, ratio_weight)

    def token_signals(self, contexts: Sequence[ContextPair]) -> dict[str, Tensor]:
        """Return the `MEASURED_SIGNALS` of every response token by name, [R] float64 each, in nats, on the host.

        The tokens have the order of ``contexts``.  The weights are the present ones, and nothing is trained.  All are
        empty where no replica has a response token.
        Collectives over the world: those of a step's forward pass, and those of `Reading.numbers`.
        """
        try:
            reading = self._read(contexts)
        except schedule.NoResponseTokens:
            return {name: torch.empty(0, dtype=torch.float64) for name in MEASURED_SIGNALS}
        statistics = ("loss" if name == "divergence" else name for name in MEASURED_SIGNALS)
        return dict(zip(MEASURED_SIGNALS, reading.numbers(*statistics), strict=True))

    def log_probs(self, contexts: Sequence[ContextPair], temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probs of every response token under student and teacher (pipeline/score.py).  Collective."""
        with self._scoring_models() as models:
            return log_probs(contexts, models, temperature=temperature)

    def candidate_log_probs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """Return the teacher's log-probs of candidates for the next token, [B, n] (pipeline/score.py).

        Collective over the world.
        """
        with self.teacher.on_device() as teacher:
            return candidate_log_probs(
                prompts, token_ids, teacher, self.grid, self.vocab, max_tokens=self.config.schedule.max_tokens
            )

    @contextlib.contextmanager
    def _scoring_models(self) -> Iterator[ScoringModels]:
        """Yield student and teacher as models that score texts; an offloaded teacher leaves the device at the end."""
        with self.teacher.on_device() as teacher:
            yield ScoringModels(
                student=self.chunks,
                teacher=teacher,
                grid=self.grid,
                vocab=self.vocab,
                max_tokens=self.config.schedule.max_tokens,
                fusion=self.output_layer.fusion,
                backend=self.config.loss.backend,
                joins_turns=self.packing.joins_turns,
            )

    def _read(
        self, contexts: Sequence[ContextPair], measurement: TokenMeasurement | None = None, teacher: str = ""
    ) -> Reading:
        """Return what the models of a step read in ``contexts``, by the loss of a step."""
        target = self.target_of(teacher)
        if self.reads_apart(teacher):
            packed = self.pack(contexts, teacher)
            output = self._self_distillation(packed, contexts, teacher, measurement, forward_only=True)
            return Reading(packed, output, self.grid)
        with self.target_models(teacher) as models:
            readers = self._models_of_step(models.teacher, self._reference(target, models.reference))
            return read(contexts, readers, Want(self._loss_of(target), measurement))

    def _models_of_step(self, teacher: Sequence[torch.nn.Module], reference: Reference | None) -> ScoringModels:
        """Return the student with ``teacher`` and ``reference``, which read contexts in the layout of a step."""
        return ScoringModels(
            student=self.chunks,
            teacher=teacher,
            grid=self.grid,
            vocab=self.vocab,
            max_tokens=self.config.schedule.max_tokens,
            reference=reference,
            pair_order=self.pair_order,
            guided=self.guided_tokens,
            teacher_store_bytes=self._teacher_store_bytes,
            joins_turns=self.packing.joins_turns,
        )

    def _self_distillation(
        self,
        packed: PackedBatch,
        contexts: Sequence[ContextPair],
        teacher: str,
        measurement: TokenMeasurement | None,
        following: str = "",
        **options: Any,
    ) -> StepOutput:
        """Run the schedule of one batch, and before it the passes of teachers that read apart.

        ``following``: the teacher of the next batch, whose weights are fetched after the last pass of this one's.
        """
        target, joined = self.target_of(teacher), None
        chunks: Sequence[torch.nn.Module] | None = None
        start: Sequence[torch.nn.Module] | None = None
        with contextlib.ExitStack() as stack:
            if self.reads_apart(teacher):
                joined = self._joined(factors_of(teacher), packed, contexts, following)
                start = None if self.reference is None else stack.enter_context(self.reference.on_device())
            else:
                chunks, start = stack.enter_context(self.target_models(teacher))
                options |= {"after_teacher": partial(self._fetch, following)} if following else {}
            options |= {"reference": self._reference(target, start), "measurement": measurement, "joined": joined}
            return self._schedule(packed, chunks, self._loss_of(target), **options)

    def _fetch(self, following: str) -> None:
        """Begin to copy the weights of the next teacher, or the next product's first one, beside the passes to come."""
        for name, copy in product(factors_of(following)[:1], self._frozen_copies):
            copy.fetch(name)

    def _joined(
        self, names: Sequence[str], packed: PackedBatch, contexts: Sequence[ContextPair], following: str
    ) -> schedule.JoinedTeachers:
        """Let each teacher read the contexts, in the order of the names, and return them as one.

        Collective: one pass of the schedule per teacher.  ``following``: the teacher after the last of them.
        """
        of_contexts = [it.of_teachers or (TeacherPrompt(it.teacher, 1.0, it.teacher_prompt),) for it in contexts]
        states: list[schedule.TeacherHiddenStates] = []
        weight: Tensor | None = None
        ends = list(accumulate(self.other_widths.get(name, self._width) // self.grid.tp_size for name in names))
        for place, name in enumerate(names):
            with self.target_models(name) as models:
                last = unwrapped(models.teacher[-1])
                packing = replace(self._packing_of(last.config), with_teacher=False, with_reference=False)
                reading = self._pack_alone([several[place].prompt for several in of_contexts], contexts, packing)
                known = models.teacher if name in self.other_widths else self.chunks
                parts = known, models.teacher, packed, reading, self.grid, self.vocab
                states.append(schedule.read_states(*parts, store_bytes=self._teacher_store_bytes / len(names)))
                if last.post_process:  # copied, since the next teacher may take the place of this one
                    own = output_weight(last, torch.empty(0)).detach().unflatten(1, (self.grid.tp_size, -1))
                    weight = own.new_empty(*own.shape[:2], ends[-1]) if weight is None else weight
                    weight[:, :, ends[place] - own.size(2) : ends[place]] = own
                self._fetch([*names, following][place + 1])
        pairs = zip(contexts, of_contexts, strict=True)
        shares = [[one.share for one in several] for context, several in pairs for _ in context.response]
        of_tokens = torch.tensor(shares, dtype=torch.float64).reshape(-1, len(names))
        own, token_weights = [self.target_of(name).teacher_weight for name in names], None
        if len(names) > 1 and set(own) != {self.target.teacher_weight}:
            of_tokens = of_tokens * torch.tensor(own, dtype=torch.float64)
            token_weights = of_tokens.sum(1)
            of_tokens = of_tokens / token_weights.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        of_tokens, token_weights = to_device_in_one_copy((of_tokens.float(), token_weights), self.grid.device)
        joined_weight = None if weight is None else weight.flatten(1)
        return schedule.JoinedTeachers(states, of_tokens, token_weights, joined_weight)

    def _measurement(self, teacher: str, summarises: bool = False) -> TokenMeasurement:
        loss = self.config.loss
        return TokenMeasurement(self.target_of(teacher), loss.fused_chunk_tokens, loss.backend, summarises)

    def _schedule(
        self,
        packed: PackedBatch,
        teacher: Sequence[torch.nn.Module] | None,
        token_loss: token_losses.TokenLoss | FusedLoss,
        **options: Any,
    ) -> StepOutput:
        return schedule.run(
            self.chunks,
            teacher,
            packed,
            token_loss,
            self.grid,
            self.vocab,
            guided=self.guided_tokens,
            pair_order=self.pair_order,
            teacher_store_bytes=self._teacher_store_bytes,
            **options,
        )

    @property
    def _teacher_store_bytes(self) -> float:
        return self.config.schedule.teacher_store_gb * 2**30

    @property
    def guided_tokens(self) -> token_losses.GuidedTokens:
        """What the configuration gives to the tokens of guided problems alone."""
        weight, loss = self.config.target.guided_teacher_weight, self.config.loss
        kind = loss.guided_divergence
        return token_losses.GuidedTokens(weight, None if kind is None else Divergence(kind, loss.jsd_lambda))

    def _reference(self, target: Target, chunks: Sequence[torch.nn.Module] | None) -> Reference | None:
        if not self.config.is_anchored:
            return None
        assert chunks is not None
        return Reference(target, chunks, self.config.loss.fused_chunk_tokens, self.config.loss.backend)

    def _loss_of(self, target: Target) -> token_losses.TokenLoss | FusedLoss:
        """Return ``distillation_loss``, or another one where a teacher has a weight of its own."""
        return self.distillation_loss if target is self.target else self._distillation_loss(target)

    def _distillation_loss(self, target: Target) -> token_losses.TokenLoss | FusedLoss:
        loss = self.config.loss
        divergence = Divergence.configured(loss, self.config.method)
        return token_losses.self_distillation(target, divergence, loss.backend, fusion=self.output_layer.fusion)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients for `apply_gradients`, and return their 2-norm before clipping.

    Collectives: one sum over the ranks that share a model, or over the world where optimizer states are distributed;
    the host waits for it.

    Raises: RuntimeError for an overflowed loss scale, which bf16 and fp32 do not have.
    """
    if optimizer.prepare_grads():
        raise RuntimeError("gradients overflowed their loss scale; expected bf16 or fp32, which have no loss scale")
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the prepared gradients by ``norm``, the result of `gradient_norm`, and update the parameters.

    The updated parameters equal those of ``optimizer.step()`` bit for bit.

    Collectives: the gather of updated parameters that Megatron's distributed optimizer makes.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def _require_weight_alone(last: GPTModel) -> None:
    if last.post_process and (reason := unfusable(last)):
        raise ConfigError(
            f"teachers.join=product needs an output layer that multiplies by its weight alone, but {reason}: set "
            "teachers.join=sum"
        )


def _in_roles(weights: Teacher, *roles: str) -> RoleWeights:
    return RoleWeights(roles, weights.chunks, weights.on_device)


def loss_backend(config: Config, grid: RankGrid) -> str:
    """Return the backend of the loss and the reason for it, for the log.  Raises: `ConfigError` where it cannot run."""
    dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
    try:
        name, why = in_use(config.loss.backend, grid.device, dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return f"{'Triton kernels' if name == 'triton' else 'PyTorch'} ({why})"
