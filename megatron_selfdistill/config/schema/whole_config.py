# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration: all sections, and the facts about a run that follow from several sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config.methods import settings_of
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig, EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import Part, check_fields
from megatron_selfdistill.config.schema.method_config import STUDENT, MethodSettings, Needs
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.ranges import FilePath, PositiveInt, Seed
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    GuardsConfig,
    MetricsConfig,
    ReportConfig,
    StopConfig,
)
from megatron_selfdistill.config.schema.step_config import (
    ClusterConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from megatron_selfdistill.config.schema.target_config import LossConfig, TargetConfig, TeacherConfig


@dataclass(frozen=True)
class Config:
    """The configuration of a run, with all its sections."""

    run_dir: FilePath = ""
    """Directory of the run: checkpoints, teacher, metrics and resolved configuration.  It must be set."""
    num_steps: PositiveInt = 100
    """Number of optimizer steps of the run, over all launches."""
    seed: Seed = 0
    """Seed of the order of the data, of sampling and of the initial weights."""
    dry_run: bool = False
    """Whether the run only checks and ends.  Under a launch it ends after everything has been built, before the first
    step.  Without a launch, and with cluster.num_gpus, it computes the memory of every rank and the bubble from shapes
    alone, on any machine and without GPUs."""
    teachers: dict[str, Any] = field(default_factory=dict)
    """Teachers with other weights than the student's start, by name: the field teacher of a record names the
    teacher of its responses.  A record that names none has the only teacher, or of several the one with the name
    default.  Each has the entries load (a checkpoint of Megatron or a Hugging Face directory with the student's
    tokenizer, or adapters on checkpoint.load; null is the weights at the start of the run), hint (given or none),
    template (in place of data.teacher_template), view (in place of data.views.teacher), weight (in place of
    target.teacher_weight) and transformer (in place of model.transformer, for another architecture).  With {math:
    {load: DIR}, default: {}} the records of math learn from DIR, and all others from the start of the run, which
    sees their solutions.  Three entries are no teachers: choose is the dotted path of a function of a record and
    the names that returns the teacher's name, or weights by name, in place of the field; join is sum (the default)
    or product, the weighted geometric mean of the teachers of a record with weights; guide is the name of the
    teacher whose problems rollout.guidance=mixed guides."""
    method: MethodSettings = field(default_factory=lambda: settings_of({}))
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    def __post_init__(self) -> None:
        check_fields("", self)
        for part in [one for one in vars(self).values() if isinstance(one, Part)]:
            part.check(self)
        if self.teachers or "teacher" in self.data.fields:
            door("teachers_config").check_teachers(self)
        self.needs.check(f"method.name={self.method.name}", self)
        self.method.check(self)

    @cached_property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return self.method.needs

    @cached_property
    def named_teachers(self) -> Mapping[str, Any]:
        """The teachers of the key ``teachers`` by name, in the order of the names; empty without the key."""
        return door("teachers_config").named_teachers(self.teachers) if self.teachers else {}

    @property
    def why_teachers_differ(self) -> str | None:
        """Why the readings of the run's teachers after the hints of other problems do not compare; None if they do."""
        return door("teachers_config").why_teachers_differ(self) if self.teachers else None

    @property
    def has_teacher(self) -> bool:
        """Whether the loss has a teacher; other methods train on next tokens or on rewards alone."""
        return self.needs.teacher_prompt is not None

    @property
    def keeps_teacher(self) -> bool:
        """Whether the run has a teacher's weights: for the loss, or to read texts."""
        return self.has_teacher or self.needs.scores

    @property
    def is_anchored(self) -> bool:
        """Whether the target's anchor is a frozen reference, or has a share of one."""
        return self.has_teacher and self.target.anchor != "student"

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a copy of the weights of its own.

        A frozen teacher's weights are the reference's, and with adapters it is the model without them.
        """
        return self.is_anchored and self.teacher.weights != "frozen" and trains_all_weights(self)

    @property
    def logged(self) -> bool:
        """Whether the responses are the replies of a log, so that no response is sampled."""
        return self.data.kind == "conversations" and self.conversations.responses == "logged"

    @property
    def samples_responses(self) -> bool:
        """Whether the responses are sampled; otherwise they are the solutions of the data, or the replies of a log."""
        return self.needs.samples is not None and not self.logged

    @property
    def student_samples(self) -> bool:
        """Whether the student samples the responses, which otherwise say nothing about the student."""
        return self.needs.samples == STUDENT and self.samples_responses

    @property
    def samples(self) -> bool:
        """Whether anything is sampled: responses, texts of the model, or answers to held-out problems."""
        evaluates = self.evaluation.path is not None and (self.evaluation.every or self.evaluation.at_start)
        return not self.logged or bool(evaluates) or self.needs.asks_model

    @property
    def shows_contents(self) -> bool:
        """Whether problems and responses may be shown as text (conversations: conversations.show_contents)."""
        return self.data.kind != "conversations" or self.conversations.show_contents


def trains_all_weights(config: Config) -> bool:
    """Return whether the run trains the weights of the model themselves, and no adapters beside them."""
    return not config.adapter.rank


def record_teachers(config: Config) -> Any:
    """Return the `RecordTeachers` that say who teaches each record; None if all records have the default teacher."""
    return door("taught_records").TaughtRecords.of(config) if config.named_teachers else None


def projects_reference(config: Config) -> bool:
    """Return whether the reference has an output layer of its own, so that no mix of states serves both models."""
    loads_teachers = any(teacher.load is not None for teacher in config.named_teachers.values())
    is_shared = not isinstance(config.target.anchor, str)
    return config.copies_reference or (config.is_anchored and (loads_teachers or is_shared))
