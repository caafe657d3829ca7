# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teachers of the key ``teachers``: whose weights read a batch, towards which target, and in which order."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics.samples import SeenHint
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_on_meta, new_chunks
from megatron_selfdistill.model.forward import unwrapped, uses_local_attention
from megatron_selfdistill.model.fused_loss import output_weight
from megatron_selfdistill.model.output_layer import unfusable
from megatron_selfdistill.model.teacher_weights import Chunks
from megatron_selfdistill.pipeline.batch import DeviceBatch, Packing, held_by, pack_everywhere, teacher_microbatches
from megatron_selfdistill.pipeline.configured_packing import configured_packing
from megatron_selfdistill.pipeline.joined_batches import weights_unchanged
from megatron_selfdistill.pipeline.next_token import next_token
from megatron_selfdistill.pipeline.schedule import ScheduledStep, ScheduledTeacher, TeacherHiddenStates
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import RoleWeights
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.teacher import TargetModels, Teachers, in_roles
from megatron_selfdistill.teachers.joined import JoinedTeachers
from megatron_selfdistill.teachers.teacher_copies import AdapterTeacher, NamedTeachers, require_host_memory
from megatron_selfdistill.teachers.teacher_directories import (
    DIGESTS,
    TeacherCopy,
    about_architecture,
    adapter_teachers,
    directory_digests,
    load_adapter_teacher,
    load_teacher,
    require_teachers,
    teacher_architectures,
    teacher_copies,
    teacher_directories,
)
from megatron_selfdistill.teachers.teacher_groups import by_teacher, teacher_metrics
from megatron_selfdistill.teachers.teachers_config import NamedTeacher, factors_of, guide_of, joins, keeps_start


class ConfiguredTeachers(Teachers):
    """The teachers of the key ``teachers``, on one rank.

    A product of teachers, and a teacher of another architecture, reads a batch in schedules of its own, before the
    student; other teachers are microbatches of the student's schedule.
    """

    @classmethod
    def require(cls, config: Config) -> None:
        """Raise an error unless each directory holds a model that can read the student's tokens.

        Raises: `ConfigError`, `CheckpointError`.
        """
        require_teachers(config)

    @classmethod
    def has_experts(cls, config: Config) -> bool:
        """Return whether a teacher of another architecture than the student's is a mixture of experts."""
        return any(model.num_moe_experts is not None for model in teacher_architectures(config).values())

    def __init__(
        self,
        config: Config,
        grid: RankGrid,
        vocab: VocabShard,
        student: Sequence[torch.nn.Module],
        build_chunks: Callable[[], Chunks],
        saved: SavedRun | None = None,
        start: Chunks | None = None,
    ) -> None:
        """Load the teachers; the arguments are those of `Teachers`.

        Raises: `ConfigError`, `CheckpointError` on all ranks.
        """
        self._digests = directory_digests(config, saved)
        copies, adapted = teacher_copies(config), list(adapter_teachers(config))
        self._require_room(config, grid, vocab, student, copies)
        self._joins, last = joins(config.teachers), unwrapped(student[-1])
        if self._joins:
            with raise_on_all_ranks():
                if last.post_process and (reason := unfusable(last)):
                    raise ConfigError(
                        "teachers.join=product needs an output layer that multiplies by its weight alone, but "
                        f"{reason}: set teachers.join=sum"
                    )
        reads_start = keeps_start(config) or bool(adapted)
        super().__init__(config, grid, vocab, student, build_chunks, saved, start, keeps_start=reads_start)
        self.names = list(config.named_teachers)
        self._settings: Mapping[str, NamedTeacher] = config.named_teachers
        self._width = last.config.hidden_size
        self._other_widths: dict[str, int] = {}
        """The hidden size of each teacher that has another architecture than the student."""
        self._copies: list[NamedTeachers] = []
        self._weights = self._loaded(copies, adapted)
        """The weights of each teacher that has weights of its own, by name."""

    def batches(self, batch: StepBatch) -> Iterator[StepBatch]:
        """Yield the batch of each teacher or product of teachers that the contexts name; see `by_teacher`."""
        return by_teacher(batch, self.names, self.grid, joins=self._joins)

    def pack(self, contexts: Sequence[ContextPair], packing: Packing, teacher: str) -> PackedBatch:
        """Return the contexts as microbatches: those of the student alone for teachers that read apart."""
        if not self._reads_apart(teacher):
            return pack_everywhere(contexts, packing, self.grid)
        prompts = [context.student_prompt for context in contexts]
        return self._pack_alone(prompts, contexts, replace(packing, with_teacher=False))

    def target(self, target: Target, teacher: str) -> Target:
        """Return the target of the tokens of a teacher, with the weight w of this teacher if it has one.

        Raises: ValueError for a name that is none of a teacher or a product.
        """
        weight = self._settings_of(teacher).weight
        return target if weight is None else target.with_teacher_weight(weight)

    @contextlib.contextmanager
    def models(
        self, packed: PackedBatch, contexts: Sequence[ContextPair], teacher: str, following: str
    ) -> Iterator[TargetModels]:
        """Yield the models of the target of one batch; teachers that read apart read the contexts now.

        The weights of the ``following`` teacher are fetched after the last pass of this one.
        """
        with contextlib.ExitStack() as stack:
            if self._reads_apart(teacher):
                joined = self._joined(factors_of(teacher), packed, contexts, following)
                reference = None if self.reference is None else stack.enter_context(self.reference.on_device())
                yield TargetModels(joined, reference)
                return
            fetch = partial(self._fetch, following) if following else None
            chunks = self._on_device(teacher, stack)
            yield TargetModels(ScheduledTeacher(chunks, fetch), self.reference_beside_start(stack))

    @property
    def role_weights(self) -> list[RoleWeights]:
        """The weights, other than the student's, with which a sampler guides responses: those of teachers.guide."""
        guide = self._weights.get(guide_of(self.config.teachers) or "")
        if guide is None or not self.config.rollout.samples_target:
            return super().role_weights
        return [guide, *([] if self.reference is None else [in_roles(self.reference, "reference")])]

    def metrics(self, outputs: Sequence[tuple[str, StepOutput]]) -> dict[str, float]:
        """Return the `teacher_metrics` of a step.  Collective."""
        return teacher_metrics(outputs, self.grid)

    def seen_hint(self, context: ContextPair, solution: str) -> SeenHint:
        """Return the hint that a teacher of the response sees, with the names of its teachers."""
        names = [one.teacher for one in context.of_teachers] or [context.teacher]
        shown = [name if self._settings[name].is_hinted else f"{name} (sees no hint)" for name in names]
        return SeenHint(solution if any(self._settings[name].is_hinted for name in names) else "", ", ".join(shown))

    def announced(self, problems: Sequence[Problem]) -> Iterator[str]:
        """Yield a line per teacher: its weights, what it sees, and how many problems name it."""
        return about_teachers(self._settings, problems, self._other_widths)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the digest of each teacher's directory, which a run that continues compares."""
        return {DIGESTS: self._digests} if self._digests else {}

    def _require_room(
        self,
        config: Config,
        grid: RankGrid,
        vocab: VocabShard,
        student: Sequence[torch.nn.Module],
        copies: Sequence[TeacherCopy],
    ) -> None:
        resting: dict[str, Sequence[torch.nn.Module]] = {}
        for model, directories in copies:
            chunks = student
            if model is not config.model:
                with about_architecture(f"teachers.{', '.join(directories)}"):
                    transformer = transformer_config(model, config.parallel, config.optimizer, config.schedule)
                    chunks = build_on_meta(model, transformer, grid, vocab.vocab_size)
            if config.teacher.offload == "cpu" or len(directories) > 1:
                resting |= dict.fromkeys(directories, chunks)
        require_host_memory(resting)

    def _loaded(self, copies: Sequence[TeacherCopy], adapted: Sequence[str]) -> dict[str, RoleWeights]:
        """Load the teachers; ``adapted``: the names of those that are adapters on the start."""
        config, run_dir, directories_of = self.config, Path(self.config.run_dir), teacher_directories(self.config)
        offload, vocab_size = config.teacher.offload == "cpu", self.vocab.vocab_size
        found: dict[str, RoleWeights] = {}

        def load(path: Path, chunks: Chunks) -> None:
            load_teacher(path, chunks, vocab_size, run_dir, config.checkpoint.verify)

        for name in adapted:
            on_start = load_adapter_teacher(directories_of[name], self.start.chunks, config, self.grid)
            teacher = AdapterTeacher(on_start, device=self.grid.device, rests=offload or len(adapted) > 1)
            found[name] = RoleWeights(("teacher",), teacher.chunks, teacher.on_device)
        for model, directories in copies:
            build = partial(new_chunks, config, self.grid, vocab_size, model)
            copy = NamedTeachers(directories, build, load, offload=offload)
            self._copies.append(copy)
            for name in directories:
                found[name] = RoleWeights(("teacher",), copy.chunks, partial(copy.on_device, name))
            if model is not config.model:
                self._other_widths |= dict.fromkeys(directories, unwrapped(copy.chunks[0]).config.hidden_size)
        return found

    def _settings_of(self, name: str) -> NamedTeacher:
        """Return the settings of a teacher.  Raises: ValueError if no single one of the run reads the contexts."""
        if self._is_product(name):
            return NamedTeacher()  # a product has no entries of its own
        if name not in self._settings:
            raise ValueError(f"expected contexts of one of the teachers {', '.join(self.names)}, got {name!r}")
        return self._settings[name]

    def _is_product(self, name: str) -> bool:
        factors = factors_of(name)
        return self._joins and len(factors) > 1 and all(factor in self._settings for factor in factors)

    def _reads_apart(self, name: str) -> bool:
        """Return whether a product of teachers, or a teacher of another architecture, reads in schedules of its own."""
        return name in self._other_widths or self._is_product(name)

    def _on_device(self, name: str, stack: contextlib.ExitStack) -> Chunks:
        """Return the chunks of a teacher on the device until the ``stack`` ends, with those of the start."""
        chunks = stack.enter_context(self.start.on_device())
        if self._settings_of(name).load is not None:
            stack.enter_context(self._weights[name].on_device())
            chunks = [*self._weights[name].chunks]
        return chunks

    def _fetch(self, following: str) -> None:
        """Begin to copy the weights of the next teacher, or the next product's first one, beside the passes to come."""
        for name, copy in product(factors_of(following)[:1], self._copies):
            copy.fetch(name)

    def _pack_alone(
        self, prompts: Sequence[list[int]], contexts: Sequence[ContextPair], packing: Packing
    ) -> PackedBatch:
        """Return the responses of ``contexts`` after ``prompts`` as the student's microbatches of a step."""
        alone = [replace(it, student_prompt=p, teacher_prompt=p) for it, p in zip(contexts, prompts, strict=True)]
        return replace(pack_everywhere(alone, packing, self.grid), teacher=[])

    def _joined(
        self, names: Sequence[str], packed: PackedBatch, contexts: Sequence[ContextPair], following: str
    ) -> JoinedTeachers:
        """Let each teacher read the contexts, in the order of the names, and return them as one.

        Collective: one pass of the schedule per teacher.  ``following``: the teacher after the last of them.
        """
        of_contexts = [it.of_teachers or (TeacherPrompt(it.teacher, 1.0, it.teacher_prompt),) for it in contexts]
        each: list[TeacherHiddenStates] = []
        widths = [self._other_widths.get(name, self._width) // self.grid.tp_size for name in names]
        store_bytes = self.config.schedule.teacher_store_gb * 2**30 / len(names)
        weight: Tensor | None = None
        for place, name in enumerate(names):
            with contextlib.ExitStack() as stack:
                chunks = self._on_device(name, stack)
                prompts, last = [several[place].prompt for several in of_contexts], unwrapped(chunks[-1])
                packing = configured_packing(self.config, self.grid, last.config)
                packing = replace(packing, with_teacher=False, with_reference=False)
                reading = self._pack_alone(prompts, contexts, packing)
                known = chunks if name in self._other_widths else self.student
                each.append(read_states(known, chunks, packed, reading, self.grid, self.vocab, store_bytes=store_bytes))
                if last.post_process:  # copied, since the next teacher may take the place of this one
                    own = output_weight(last, torch.empty(0)).detach().unflatten(1, (self.grid.tp_size, -1))
                    weight = own.new_empty(*own.shape[:2], sum(widths)) if weight is None else weight
                    weight.split(widths, dim=2)[place].copy_(own)
                self._fetch([*names, following][place + 1])
        shares, token_weights = self._shares(names, of_contexts, contexts)
        return JoinedTeachers(each, shares, token_weights, None if weight is None else weight.flatten(1))

    def _shares(
        self, names: Sequence[str], of_contexts: Sequence[Sequence[TeacherPrompt]], contexts: Sequence[ContextPair]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the share of each teacher for each response token, and the w of each token if they differ."""
        pairs = zip(contexts, of_contexts, strict=True)
        listed = [[one.share for one in several] for context, several in pairs for _ in context.response]
        shares = torch.tensor(listed, dtype=torch.float64).reshape(-1, len(names))
        run, weights = self.config.target.teacher_weight, None
        own = [run if (weight := self._settings[name].weight) is None else weight for name in names]
        if len(names) > 1 and set(own) != {run}:
            shares = shares * torch.tensor(own, dtype=torch.float64)
            weights = shares.sum(1)
            shares = shares / weights.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        found: tuple[Tensor, Tensor | None] = to_device((shares.float(), weights), self.grid.device)
        return found


def read_states(
    student: Sequence[torch.nn.Module],
    teacher: Sequence[torch.nn.Module],
    batch: PackedBatch,
    reading: PackedBatch,
    grid: RankGrid,
    vocab: VocabShard,
    *,
    store_bytes: float = float("inf"),
) -> TeacherHiddenStates:
    """Return the final hidden states of ``teacher`` at the response tokens of ``batch``, on the last stage.

    ``reading``: the same responses after the teacher's prompts, as the microbatches of a student.  Nothing is trained,
    and the gradients of a step that is under way stay.  ``student``: the chunks that the schedule knows, whose states
    have the shapes of those of ``teacher``.
    Collectives: those of the schedule.
    """
    microbatches = teacher_microbatches(
        batch, replace(reading, teacher=reading.student), grid, uses_local_attention(student)
    )
    sizes = [len(held_by(microbatch, grid.cp_size, grid.cp_rank)[1]) for microbatch in batch.student]
    on_device = to_device(DeviceBatch([], microbatches, sizes), grid.device)
    states = TeacherHiddenStates(on_device, grid, unwrapped(teacher[0]).config.hidden_size, store_bytes)
    step = ScheduledStep(
        student=list(student),
        teacher=ScheduledTeacher(teacher),
        batch=on_device,
        token_loss=next_token,
        reference=None,
        measurement=None,
        token_coefficients=None,
        grid=grid,
        vocab=vocab,
        loss_scale=1.0,
        states=states,
    )
    with weights_unchanged(student):
        step.run([("teacher", i) for i in range(len(on_device.teacher))], reading.seq_length, forward_only=True)
    return states


def about_teachers(
    teachers: Mapping[str, NamedTeacher], problems: Sequence[Problem], widths: Mapping[str, int]
) -> Iterator[str]:
    """Yield a line per teacher: its weights, its view, and how many problems name it.

    ``widths``: the hidden size of each teacher of another architecture than the student's.
    """
    taught = Counter(name for problem in problems for name, _ in problem.shares or ((problem.teacher, 1.0),))
    for name, teacher in teachers.items():
        place = teacher.load or "the weights at the start"
        view = "the solutions" if teacher.is_hinted else "no solutions"
        unused = "" if taught[name] or teacher.load is None else "; warning: it is loaded, and no record names it"
        other = f" (another architecture of hidden size {widths[name]})" if name in widths else ""
        yield f"teachers.{name}: {place}{other}, sees {view}, problems: {taught[name]:,}{unused}"
