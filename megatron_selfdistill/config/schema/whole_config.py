# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration: all sections, and the rules that bind one section to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_selfdistill.config.methods import default_settings
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig, check_adapters
from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig, EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.method_config import (
    FOUND,
    GIVEN,
    HINTED,
    MEASURED,
    SAME,
    STUDENT,
    TEACHER,
    MethodSettings,
    Needs,
)
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.ranges import FilePath, PositiveInt, Seed
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig, check_ahead
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
from megatron_selfdistill.config.schema.teachers_config import (
    NamedTeacher,
    check_teachers,
    chosen_by,
    guide_of,
    joins,
    named_teachers,
)


def check_conversations(
    method: str, needs: Needs, conversations: ConversationsConfig, rollout: RolloutConfig, loss: LossConfig
) -> None:
    """Raise `ConfigError` where other keys contradict ``data.kind=conversations``; ``method``: the method's name."""
    require(
        needs.teacher_prompt == HINTED and needs.hint != FOUND,
        "data.kind=conversations needs a method whose teacher sees what follows a turn of the log, such as "
        f"method.name=default, chat_logs or openclaw, got {method}",
    )
    logged = conversations.responses == "logged"
    sampled = rollout.guidance != "none" or rollout.replay or rollout.record
    require(
        not (logged and (sampled or loss.rollout_correction != "none")),
        "conversations.responses=logged samples nothing: unset rollout.guidance, rollout.replay, rollout.record "
        "and loss.rollout_correction, or set conversations.responses=sampled",
    )


def check_reference(has_teacher: bool, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` where other keys contradict ``target.anchor=reference``."""
    require(
        rollout.guidance == "none" or has_teacher,
        "rollout.guidance=mixed with target.anchor=reference samples from the weights of teacher and reference, which "
        "only a method with a teacher has: set method.name=default, rollout.guidance=none or target.anchor=student",
    )


def check_guided_tokens(has_teacher: bool, rollout: RolloutConfig, target: TargetConfig, loss: LossConfig) -> None:
    """Raise `ConfigError` where settings of guided tokens lack guidance."""
    for key, value in (
        ("target.guided_teacher_weight", target.guided_teacher_weight),
        ("loss.guided_divergence", loss.guided_divergence),
    ):
        require(
            value is None or (rollout.guidance == "mixed" and has_teacher),
            f"{key} is for the tokens of guided problems: it needs rollout.guidance=mixed and a method with a teacher, "
            f"got rollout.guidance={rollout.guidance}",
        )


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
    method: MethodSettings = field(default_factory=default_settings)
    """The method that the run follows, with its settings."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture of the model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters on frozen weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The parallel layout."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines that the run is meant for."""
    data: DataConfig = field(default_factory=DataConfig)
    """Problems, tokenizer and prompts."""
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    """Chat logs."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The sampling of responses."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What replies to responses."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """The target of the training."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The divergence from the target."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The weights of the teacher."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The order and the memory of a step in the pipeline."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The update of the weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints that are read and written."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """The display of metrics and samples."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The report of the run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluation on held-out problems."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """The limits beyond which a run is unhealthy."""
    stop: StopConfig = field(default_factory=StopConfig)
    """The reasons to end a run before its last step."""

    def __post_init__(self) -> None:
        check_fields("", self)
        needs = self.needs
        if self.data.kind == "conversations":
            check_conversations(self.method.name, needs, self.conversations, self.rollout, self.loss)
        if self.loss.rollout_correction != "none":
            self._check_correction(f"loss.rollout_correction={self.loss.rollout_correction}")
        self._check_prompts()
        self._check_terms()
        if self.environment.exists:
            self._check_environment()
        sampled = needs.samples is not None and not self.logged
        check_ahead(self.method.name, needs, self.rollout, self.environment, samples_responses=sampled)
        if self.target.anchor == "reference":
            check_reference(self.has_teacher, self.rollout)
        check_guided_tokens(self.has_teacher, self.rollout, self.target, self.loss)
        if self.teachers:
            self._check_teachers()
        require(
            (bool(self.teachers) and self.teacher_choice is None) or "teacher" not in self.data.fields,
            "data.fields.teacher names the column with the teacher of a record, but "
            + (f"teachers.choose={self.teacher_choice} chooses it" if self.teachers else "there are no teachers")
            + ": set the key teachers without choose, or unset data.fields.teacher",
        )
        require(
            self.has_teacher or self.loss.fused in (None, "none"),
            f"loss.fused={self.loss.fused} fuses the output layer with the distillation loss, but {self._method} "
            "trains on next tokens: set loss.fused=none, or null",
        )
        if self.adapter.rank:
            averages = self.keeps_teacher and self.teacher.weights == "ema"
            check_adapters(self.adapter, self.rollout, self.checkpoint, averages)
        hang, collective = self.stop.hang_timeout_minutes, self.parallel.distributed_timeout_minutes
        require(
            hang is None or hang < collective,
            f"stop.hang_timeout_minutes ({hang}) must be below parallel.distributed_timeout_minutes ({collective}), "
            "after which a waiting rank ends the run: raise parallel.distributed_timeout_minutes",
        )
        require(
            self.rollout.guidance == "none" or self.rollout.replay is None,
            "rollout.guidance=mixed samples responses, but rollout.replay takes them from a file: unset one key",
        )
        self.method.check(self)

    @cached_property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return self.method.needs

    @cached_property
    def named_teachers(self) -> dict[str, NamedTeacher]:
        """The teachers of the key ``teachers`` by name, in the order of the names; empty without the key."""
        return named_teachers(self.teachers)

    @property
    def teacher_choice(self) -> str | None:
        """The dotted path of the function that chooses the teacher of a record; None where the record names it."""
        return chosen_by(self.teachers)

    @property
    def guide(self) -> str | None:
        """The name of the teacher whose problems are guided; None without guidance or the key ``teachers``."""
        return guide_of(self.teachers)

    @property
    def joins_teachers(self) -> bool:
        """Whether several teachers of a record teach as their product."""
        return joins(self.teachers)

    @property
    def loads_teachers(self) -> bool:
        """Whether a teacher has the weights of a directory of its own."""
        return any(teacher.load is not None for teacher in self.named_teachers.values())

    @property
    def keeps_start(self) -> bool:
        """Whether the loss reads the weights at the start of the run, as a teacher or as the reference."""
        named = self.named_teachers.values()
        return self.is_anchored or not named or any(teacher.load is None for teacher in named)

    @property
    def has_teacher(self) -> bool:
        """Whether the loss has a teacher; other methods train on next tokens or on rewards alone."""
        return self.needs.teacher_prompt is not None

    @property
    def reads_solutions(self) -> bool:
        """Whether the method shows or trains on solutions; others learn from rewards or from samples alone."""
        return self.needs.teacher_prompt == HINTED or self.needs.samples != STUDENT or self.needs.hint != GIVEN

    @property
    def logged(self) -> bool:
        """Whether the responses are the replies of a log, so that no response is sampled."""
        return self.data.kind == "conversations" and self.conversations.responses == "logged"

    @property
    def is_anchored(self) -> bool:
        """Whether the target mixes the teacher with a frozen reference."""
        return self.has_teacher and self.target.anchor == "reference"

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a copy of the weights of its own.

        A frozen teacher's weights are the reference's, and with adapters it is the model without them.
        """
        return self.is_anchored and self.teacher.weights != "frozen" and not self.adapter.rank

    @property
    def projects_reference(self) -> bool:
        """Whether the reference has an output layer of its own, so that no mix of states serves both models."""
        return self.copies_reference or (self.is_anchored and self.loads_teachers)

    @property
    def has_policy_term(self) -> bool:
        """Whether the loss has a term -log p of the response token beside the divergence from a target."""
        return self.has_teacher and self.needs.log_probs is not None

    @property
    def measures_log_probs(self) -> bool:
        """Whether a step measures the log-probs of its responses under student and target before it trains."""
        return self.needs.log_probs == MEASURED

    @property
    def reads_one_prompt(self) -> bool:
        """Whether student and teacher read a response after the prompt that it was sampled after."""
        return self.needs.teacher_prompt == SAME

    @property
    def loss_should_fall(self) -> bool:
        """Whether the loss is a divergence from a teacher with a given hint, and no reward works against it."""
        return self.needs.teacher_prompt == HINTED and self.needs.hint == GIVEN and not self.needs.rewards

    @property
    def max_contexts_per_sample(self) -> int:
        """The greatest number of contexts of one sample, over the turns of its episode."""
        return self.environment.max_turns * self.needs.contexts_per_sample

    @property
    def keeps_teacher(self) -> bool:
        """Whether the run has a teacher's weights: for the loss, or to read texts."""
        return self.has_teacher or self.needs.scores

    @property
    def sampled_log_probs_key(self) -> str | None:
        """The key that needs the probability of a response when it was sampled; None if no key needs it."""
        correction = self.loss.rollout_correction
        if self.needs.log_probs is not None:
            return self._method
        return f"loss.rollout_correction={correction}" if correction != "none" else None

    @property
    def judges_responses(self) -> bool:
        """Whether every response gets a reward before the step trains: for the method, or from an environment."""
        return not self.logged and (self.needs.rewards or self.environment.exists)

    @property
    def samples(self) -> bool:
        """Whether anything is sampled: responses, texts of the model, or answers to held-out problems."""
        evaluates = self.evaluation.path is not None and (self.evaluation.every or self.evaluation.at_start)
        return not self.logged or bool(evaluates) or self.needs.asks_model

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is saved after ``step`` steps: at the end, and as checkpoint.save_every says."""
        every = self.checkpoint.save_every
        return step == self.num_steps or (every > 0 and step % every == 0)

    def explores(self, step: int) -> bool:
        """Return whether samples of ``step``, counted from 1, are saved for the target explorer: at evaluations."""
        due = self.evaluation.due(step, self.num_steps) or (step == 1 and self.evaluation.at_start)
        return due and self.may_explore

    @property
    def may_explore(self) -> bool:
        """Whether a run of this configuration may save samples for the target explorer at all."""
        return self.has_teacher and self.shows_contents and self.metrics.num_explored > 0

    @property
    def shows_contents(self) -> bool:
        """Whether problems and responses may be shown as text (conversations: conversations.show_contents)."""
        return self.data.kind != "conversations" or self.conversations.show_contents

    @property
    def num_shown_problems(self) -> int:
        """The number of held-out problems of which an evaluation keeps responses as text: report.num_problems, or 0."""
        return self.report.num_problems if self.shows_contents else 0

    @property
    def hang_timeout_s(self) -> float | None:
        """The value of ``stop.hang_timeout_minutes``, or its default, in seconds; None is never."""
        minutes = self.stop.hang_timeout_minutes
        minutes = self.parallel.distributed_timeout_minutes * 5 / 6 if minutes is None else minutes
        return minutes * 60 or None

    @property
    def _method(self) -> str:
        return f"method.name={self.method.name}"

    def _check_prompts(self) -> None:
        """Raise `ConfigError` where a prompt that the method needs does not exist."""
        needs, guides, solutions = self.needs, self.rollout.guidance != "none", self.data.solutions
        from_data = self.data.kind == "problems" and self.has_teacher and needs.hint == GIVEN
        require(
            solutions not in ("other", "none") or (from_data and needs.teacher_prompt == HINTED),
            f"data.solutions={solutions} is a control for hints from the solutions of the data, but {self._method} "
            f"with data.kind={self.data.kind} has no such hints: set data.solutions=given",
        )
        require(
            needs.samples != TEACHER or not (needs.hint_follows or self.logged or guides),
            f"{self._method} samples after the hint alone, which hints after the sampling, logged conversations and "
            "rollout.guidance=mixed do not allow: set rollout.guidance=none",
        )
        require(
            not (needs.hint_follows and guides),
            f"{self._method} knows a hint only after the responses are sampled, but rollout.guidance=mixed samples "
            "with it: set rollout.guidance=none",
        )
        require(
            needs.teacher_prompt != SAME or not (needs.hint_follows or self.logged or guides),
            f"{self._method} reads sampled responses after the prompt that they were sampled after: it needs "
            "rollout.guidance=none, and no logged conversations",
        )
        require(
            needs.teacher_prompt != SAME or self.teacher.weights != "current",
            f"{self._method} compares the student with other weights after one prompt: it needs teacher.weights=frozen "
            "or ema, got current",
        )

    def _check_terms(self) -> None:
        needs, loss = self.needs, self.loss
        require(
            loss.fused != "keep_gradient" or not self.has_policy_term,
            f"loss.fused=keep_gradient keeps the gradient of the divergence alone, but {self._method} adds a term of "
            "another gradient: set loss.fused=low_memory, none or null",
        )
        if self.logged and needs.samples is None:
            return
        compares = needs.rewards or needs.log_probs is not None or needs.hint != GIVEN or needs.group_size > 1
        kind, responses = self.data.kind, self.conversations.responses
        require(
            self.logged or needs.samples is not None or not compares,
            f"{self._method} samples nothing, and takes the replies of a log: it needs data.kind=conversations and "
            f"conversations.responses=logged, got {kind} and {responses}",
        )
        weighs = {
            self._method: compares,
            f"loss.normalize={loss.normalize}": loss.normalize != "tokens",
            "loss.skip_first_tokens": loss.skip_first_tokens > 0,
        }
        for key in (key for key, is_set in weighs.items() if is_set):
            require(
                not self.logged and needs.samples is not None,
                f"{key} weighs the tokens of sampled responses, but "
                + ("conversations.responses=logged" if self.logged else self._method)
                + " samples nothing",
            )
        longest = self.rollout.max_new_tokens
        require(
            loss.skip_first_tokens < longest or self.rollout.replay is not None,
            f"loss.skip_first_tokens must be below rollout.max_new_tokens={longest}, or no token of a response is "
            f"trained on, got {loss.skip_first_tokens}",
        )
        require(
            needs.group_size == 1 or (self.data.kind == "problems" and self.rollout.num_samples >= needs.group_size),
            f"{self._method} compares the responses to one problem: it needs data.kind=problems and at least "
            f"{needs.group_size} for rollout.num_samples, got {self.data.kind} and {self.rollout.num_samples}",
        )
        if needs.log_probs is not None:
            self._check_correction(self._method)

    def _check_teachers(self) -> None:
        """Raise `ConfigError` where the method or the data have no place for several teachers."""
        needs = self.needs
        hinted = needs.teacher_prompt == HINTED and needs.hint == GIVEN and needs.samples == STUDENT
        require(
            hinted and needs.log_probs is None and not needs.scores and needs.contexts_per_sample == 1,
            "teachers need a method whose teacher reads sampled responses for the loss alone, with the solutions of "
            f"the data, such as method.name=default, got {self._method}",
        )
        require(
            self.data.kind == "problems" and not self.environment.exists,
            "teachers need the records of data.kind=problems, which name them, without an environment, got "
            f"data.kind={self.data.kind} and environment.name={self.environment.name}",
        )
        check_teachers(self.named_teachers, self.guide, self.joins_teachers, self.teacher, self.target, self.rollout)

    def _check_environment(self) -> None:
        name = f"environment.name={self.environment.name}"
        require(
            self.needs.samples is not None and self.data.kind == "problems",
            f"{name} replies to sampled responses to problems: it needs data.kind=problems and a method that samples, "
            f"got {self.data.kind} and {self._method}",
        )
        require(
            self.rollout.guidance == "none",
            f"{name} with rollout.guidance=mixed is not possible: set rollout.guidance=none",
        )
        require(
            self.needs.hint == GIVEN or not self.environment.one_sequence,
            f"environment.limits.one_sequence=true needs the prompts of an episode to stay as they were sampled, but "
            f"{self._method} gives each turn a hint of its own later: set environment.limits.one_sequence=false",
        )

    def _check_correction(self, key: str) -> None:
        rollout = self.rollout
        require(self.needs.samples is not None, f"{key} corrects samples, but {self._method} samples nothing")
        require(
            rollout.temperature > 0,
            f"{key} divides by the probability of a sampled token, but rollout.temperature=0 (greedy) samples none",
        )
        plain = rollout.temperature == 1 and rollout.top_k == 0 and rollout.top_p == 1
        require(
            rollout.engine != "vllm" or plain,
            f"{key} needs the log-probs of sampled tokens, and vLLM reports log-probs at temperature 1 only: set "
            f"rollout.temperature=1, top_k=0 and top_p=1, got {rollout.temperature}, {rollout.top_k}, {rollout.top_p}",
        )
