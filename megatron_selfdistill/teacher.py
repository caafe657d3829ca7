# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Who teaches: the teachers of a run as the learner sees them.

`Teachers` is the seam: the learner asks it who reads a batch, and with which weights.  The key ``teachers`` puts a
class that derives from it in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics.samples import SeenHint
from megatron_selfdistill.model.teacher_weights import Chunks, Teacher
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.pipeline.schedule import ScheduledTeacher, StepTeacher
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.rollout.base import RoleWeights
from megatron_selfdistill.sources.source import StepBatch


class TargetModels(NamedTuple):
    """The models that the target of one batch mixes with or without the student, on the device of this rank."""

    teacher: StepTeacher
    reference: Sequence[torch.nn.Module] | None
    """The reference's chunks, the teacher's own if one frozen copy is both; None without target.anchor=reference."""


class Teachers:
    """The teachers of a run on one rank; here the default: one teacher, with no weights of a directory of its own.

    A batch carries the name of its teacher, which is "" for the default.  Every rank makes the same calls.
    """

    names: Sequence[str] = ()
    """The names of the teachers; empty for the default."""

    @classmethod
    def of(cls, config: Config) -> type[Teachers]:
        """Return the class of the teachers of a run; nothing of the annex is imported without the key ``teachers``."""
        found: type[Teachers] = door("teachers").ConfiguredTeachers if config.teachers else cls
        return found

    @classmethod
    def require(cls, config: Config) -> None:
        """Raise an error unless the directories of the teachers hold models for this run; no rank needs another one."""

    @classmethod
    def has_experts(cls, config: Config) -> bool:
        """Return whether a teacher of another architecture than the student's is a mixture of experts."""
        return False

    def __init__(
        self,
        config: Config,
        grid: RankGrid,
        vocab: VocabShard,
        student: Sequence[torch.nn.Module],
        build_chunks: Callable[[], Chunks],
        saved: SavedRun | None = None,
        start: Chunks | None = None,
        *,
        keeps_start: bool = True,
    ) -> None:
        """Make the teachers of the ``student`` at the start of a run.

        ``build_chunks``: returns new chunks, cut like the student's.  ``saved``: the checkpoint that the run continues.
        ``start``: chunks that compute with the weights at the start; null if the teacher must copy these.
        ``keeps_start``: whether a teacher has the weights at the start.
        """
        self.config, self.grid, self.vocab, self.student = config, grid, vocab, student
        offload = config.teacher.offload == "cpu"
        weights = config.teacher.weights if config.keeps_teacher and keeps_start else "current"
        ema_decay = config.teacher.ema_decay
        self.start = Teacher(weights, student, build_chunks, ema_decay=ema_decay, offload=offload, start=start)
        """The teacher that has no weights of a directory of its own."""
        self.reference: Teacher | None = None
        """The initial weights that the target is anchored to: the teacher itself if it is frozen, else another copy."""
        if config.is_anchored and weights == "frozen":
            self.reference = self.start
        elif config.is_anchored:
            self.reference = Teacher("frozen", student, build_chunks, offload=offload, start=start)

    def batches(self, batch: StepBatch) -> Iterator[StepBatch]:
        """Yield the batches of a step, each of which has one teacher."""
        yield batch

    def pack(self, contexts: Sequence[ContextPair], packing: Packing, teacher: str) -> PackedBatch:
        """Return the contexts of this replica as microbatches, alike in number and length on all replicas."""
        return pack_everywhere(contexts, packing, self.grid)

    def target(self, target: Target, teacher: str) -> Target:
        """Return the target of the tokens of a teacher; ``target``: that of the run."""
        return target

    @contextlib.contextmanager
    def models(
        self, packed: PackedBatch, contexts: Sequence[ContextPair], teacher: str, following: str
    ) -> Iterator[TargetModels]:
        """Yield the models of the target of one batch; offloaded models leave the device at the end.

        ``packed``: the result of `pack` for ``contexts``.  ``following``: the teacher of the next batch, "" if unknown.
        """
        with contextlib.ExitStack() as stack:
            start = stack.enter_context(self.start.on_device()) if self.start.offload else self.start.chunks
            yield TargetModels(ScheduledTeacher(start), self.reference_beside_start(stack))

    def reference_beside_start(self, stack: contextlib.ExitStack) -> Chunks | None:
        """Return the reference's chunks on the device, which has those of ``start``; None without a reference."""
        if self.reference is None or self.reference is self.start:
            return None if self.reference is None else self.start.chunks
        return stack.enter_context(self.reference.on_device())

    @property
    def role_weights(self) -> list[RoleWeights]:
        """The weights, other than the student's, with which a sampler samples from the target.

        Without a reference they are the frozen teacher's if it is no copy, and no weights of another teacher.
        """
        if not self.config.rollout.samples_target:
            return []
        if self.reference is None:
            is_frozen_part = self.start.weights == "frozen" and not self.start.is_copy
            return [in_roles(self.start, "teacher")] if is_frozen_part else []
        if self.reference is self.start:
            return [in_roles(self.start, "teacher", "reference")]
        reference = in_roles(self.reference, "reference")
        return [reference] if self.start.weights == "current" else [in_roles(self.start, "teacher"), reference]

    def metrics(self, outputs: Sequence[tuple[str, StepOutput]]) -> dict[str, float]:
        """Return what the tokens of each teacher say of it, equal on all ranks; ``outputs``: those of the batches."""
        return {}

    def seen_hint(self, context: ContextPair, solution: str) -> SeenHint:
        """Return what the teachers of a response see of the ``solution``."""
        return SeenHint(solution if self.config.has_teacher else "")

    def announced(self, problems: Sequence[Problem]) -> Iterator[str]:
        """Yield a line about each teacher, for the start of a run."""
        yield from ()

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps to recognise the teachers' weights, as plain values."""
        return {}


def in_roles(weights: Teacher, *roles: str) -> RoleWeights:
    """Return the weights of a teacher as those of some roles of a sampler."""
    return RoleWeights(roles, weights.chunks, weights.on_device)
