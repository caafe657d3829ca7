# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration: all sections, and the rules that bind one section to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from megatron_selfdistill.choices import OBJECTIVES
from megatron_selfdistill.config.environment import FromEnvironment, Place
from megatron_selfdistill.config.schema.adapter_checks import check_adapters
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.config.schema.data_checks import check_conversations, check_hints, check_next_state
from megatron_selfdistill.config.schema.data_config import ConversationsConfig, DataConfig, SolutionsConfig
from megatron_selfdistill.config.schema.environment_config import EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.hints_config import HintsConfig
from megatron_selfdistill.config.schema.loss_config import LossConfig
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.optimizer_config import OptimizerConfig
from megatron_selfdistill.config.schema.overlap_checks import check_overlap
from megatron_selfdistill.config.schema.parallel_config import ClusterConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.config.schema.policy_config import (
    DistillConfig,
    ExplanationConfig,
    PolicyConfig,
    VerbalConfig,
)
from megatron_selfdistill.config.schema.ranges import FilePath, OneOf, PositiveInt, Seed
from megatron_selfdistill.config.schema.reward_checks import check_readers
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig
from megatron_selfdistill.config.schema.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    GuardsConfig,
    MetricsConfig,
    ReportConfig,
    StopConfig,
)
from megatron_selfdistill.config.schema.target_checks import check_guided_tokens, check_reference
from megatron_selfdistill.config.schema.target_config import TargetConfig, TeacherConfig


@dataclass(frozen=True)
class Config:
    """The configuration of a run, with all its sections."""

    run_dir: FilePath = ""
    """Directory of the run: checkpoints, teacher, metrics and resolved configuration.  It must be set."""
    num_steps: PositiveInt = 100
    """Number of optimizer steps of the run, over all launches."""
    seed: Seed = 0
    """Seed of the order of the data, of sampling and of the initial weights."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = "self_distillation"
    """The objective of the training: self_distillation (also with rewards beside the teacher, policy.weight), or a
    baseline on the same data without a teacher: sft (next-token training on the text of the solutions), rft (next-token
    training on the model's responses whose answer is right) or policy_gradient (rewards alone, as in GRPO)."""
    dry_run: bool = False
    """Whether the run only checks and ends.  Under a launch it ends after everything has been built, before the first
    step.  Without a launch, and with cluster.num_gpus, it computes the memory of every rank and the bubble from shapes
    alone, on any machine and without GPUs."""
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
    solutions: SolutionsConfig = field(default_factory=SolutionsConfig)
    """Own solutions."""
    hints: HintsConfig = field(default_factory=HintsConfig)
    """Hints that are written during the run."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The sampling of responses."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What replies to responses."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """The target of the training."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The divergence from the target."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The teacher's part in the loss."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The part of rewards in the loss."""
    explanation: ExplanationConfig = field(default_factory=ExplanationConfig)
    """The reward of explanations."""
    verbal: VerbalConfig = field(default_factory=VerbalConfig)
    """The scores that the teacher gives to responses."""
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
    from_environment: Mapping[Place, FromEnvironment] = field(
        default_factory=dict, repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """The values that come from the environment, and secrets, each with its interpolation.  This field is not a key."""

    def __post_init__(self) -> None:
        check_fields("", self)
        if self.data.kind == "conversations":
            check_conversations(self.objective, self.data, self.conversations, self.rollout, self.loss)
            if self.data.solutions == "next_state":
                check_next_state(self.conversations, self.distill, self.rollout, self.weighs_tokens)
        if self.loss.rollout_correction != "none":
            self._check_correction(f"loss.rollout_correction={self.loss.rollout_correction}")
        check_hints(self.objective, self.data, self.rollout, self.logged)
        self._check_terms()
        for key in ("revision_weight", "reply_weight"):
            require(
                not getattr(self.policy, key) or (self.environment.max_turns > 1 and self.policy.weight > 0),
                f"policy.{key} trains on texts of episodes of several turns beside their rewards: it needs "
                f"environment.name, environment.max_turns of at least 2 and policy.weight above 0, got "
                f"{self.environment.name}, {self.environment.max_turns} and {self.policy.weight:g}",
            )
        if self.environment.exists:
            self._check_environment()
        sections = self.data, self.rollout, self.distill, self.policy, self.teacher, self.environment
        check_readers(self.objective, *sections, logged=self.logged)
        sampled = self.objective != "sft" and not self.logged
        check_overlap(self.data, self.rollout, self.environment, self.loss, self.policy, samples_responses=sampled)
        if self.target.anchor == "reference":
            check_reference(self.objective, self.rollout, self.target, adapted=self.adapter.rank > 0)
        check_guided_tokens(self.objective, self.rollout, self.target, self.loss)
        require(
            self.objective == "self_distillation" or self.loss.fused in (None, "none"),
            f"loss.fused={self.loss.fused} fuses the output layer with the distillation loss, but objective="
            f"{self.objective} trains on next tokens: set loss.fused=none, or null",
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

    @property
    def logged(self) -> bool:
        """Whether the responses are the replies of a log, so that no response is sampled."""
        return self.data.kind == "conversations" and self.conversations.responses == "logged"

    @property
    def is_anchored(self) -> bool:
        """Whether the target mixes the teacher with a frozen reference."""
        return self.objective == "self_distillation" and self.target.anchor == "reference"

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a copy of the weights of its own.

        A frozen teacher's weights are the reference's, and with adapters it is the model without them.
        """
        return self.is_anchored and self.teacher.weights != "frozen" and not self.adapter.rank

    @property
    def has_policy_term(self) -> bool:
        """Whether the loss has a term -log p of the response token beside the divergence from a target."""
        return self.objective == "self_distillation" and (self.policy.weight > 0 or self.distill.signal != "full")

    @property
    def measures_log_probs(self) -> bool:
        """Whether a step measures the log-probs of its responses under student and target before it trains.

        The ratio p / mu of a logged reply, which nobody has sampled from the student, takes the measured p as mu.
        """
        takes_p_as_mu = self.logged and self.policy.weight > 0
        return self.objective == "self_distillation" and (self.distill.signal != "full" or takes_p_as_mu)

    @property
    def contexts_per_response(self) -> int:
        """The number of contexts in which a response is trained on: pi_distill trains on it after both prompts."""
        return 2 if self.objective == "self_distillation" and self.distill.rule == "pi_distill" else 1

    @property
    def reads_one_prompt(self) -> bool:
        """Whether student and teacher read a response after the prompt that it was sampled after."""
        return self.objective == "self_distillation" and self.distill.teacher_prompt == "same"

    @property
    def max_contexts_per_sample(self) -> int:
        """The greatest number of contexts of one sample: the turns of its episode, its revision and its replies."""
        turns = self.environment.max_turns
        replies = turns - 1 if self.policy.reply_weight else 0
        return turns * self.contexts_per_response + bool(self.policy.revision_weight) + replies

    @property
    def scores_responses(self) -> bool:
        """Whether the teacher gives scores to responses, as rewards or for a selection."""
        return self.policy.reward == "verbal" or self.rollout.select == "verbal"

    @property
    def keeps_teacher(self) -> bool:
        """Whether the run has a teacher's weights: for the loss, or to score responses."""
        return self.objective == "self_distillation" or self.scores_responses

    @property
    def weighs_tokens(self) -> bool:
        """Whether the coefficients of response tokens are other than 1 and 0, corrections token by token aside."""
        distills = self.objective == "self_distillation" and self.distill != DistillConfig()
        by_sequence = self.loss.rollout_correction == "truncated_sequence" or self.loss.normalize != "tokens"
        return bool(self.policy.weight or distills or by_sequence or self.loss.skip_first_tokens)

    @property
    def uses_rewards(self) -> bool:
        """Whether verdicts on all responses of a step decide what the step trains on, or with which hint."""
        ranks = self.objective == "self_distillation" and self.distill.rule != "uniform"
        hints = self.data.hints_follow_responses and self.data.solutions != "feedback"
        hints |= self.data.solutions == "skill"
        return self.policy.weight > 0 or ranks or hints or self.rollout.select != "none"

    @property
    def sampled_log_probs_key(self) -> str | None:
        """The key that needs the probability of a response when it was sampled; None where no key needs it."""
        correction = self.loss.rollout_correction
        keys = {
            "policy.weight": self.policy.weight > 0,
            f"distill.signal={self.distill.signal}": self.measures_log_probs,
            f"loss.rollout_correction={correction}": correction != "none",
        }
        return next((key for key, needs in keys.items() if needs), None)

    @property
    def judges_responses(self) -> bool:
        """Whether every response gets a reward before the step trains: for rewards, hints, rft, or an environment."""
        return not self.logged and (self.uses_rewards or self.objective == "rft" or self.environment.exists)

    @property
    def samples(self) -> bool:
        """Whether anything is sampled: responses, or answers to held-out problems."""
        evaluates = self.evaluation.path is not None and (self.evaluation.every or self.evaluation.at_start)
        return not self.logged or bool(evaluates) or self.asks_model

    @property
    def asks_model(self) -> bool:
        """Whether the model itself writes the hints or judges logged replies, so that a sampler must be built."""
        judges = self.hints.judge == "model" or (self.policy.weight > 0 and self.policy.reward is None)
        writes = {"skill": self.hints.summarizer == "model", "next_state": judges}
        return writes.get(self.data.solutions, False)

    def explores(self, step: int) -> bool:
        """Return whether samples of ``step``, counted from 1, are saved for the target explorer: at evaluations."""
        due = self.evaluation.due(step, self.num_steps) or (step == 1 and self.evaluation.at_start)
        allowed = self.objective == "self_distillation" and self.shows_contents
        return due and allowed and self.metrics.num_explored > 0

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

    def _check_terms(self) -> None:
        distill, loss, weight = self.distill, self.loss, self.policy.weight
        hints = f"data.solutions={self.data.solutions}"
        require(
            weight > 0 if self.objective == "policy_gradient" else not weight or self.objective == "self_distillation",
            f"objective={self.objective} with policy.weight={weight:g}: policy_gradient trains on rewards alone and "
            "needs a weight above 0, self_distillation may have one, and sft and rft have none",
        )
        require(
            distill.weight > 0 or self.objective != "self_distillation",
            "distill.weight=0 trains without the teacher: set objective=policy_gradient, or a weight above 0",
        )
        require(
            loss.fused != "keep_gradient" or not self.has_policy_term,
            "loss.fused=keep_gradient keeps the gradient of the divergence alone, but policy.weight or distill.signal "
            "adds a term of another gradient: set loss.fused=low_memory, none or null",
        )
        if self.logged and self.data.solutions == "next_state":
            return
        ratios = {"policy.weight": weight > 0, f"distill.signal={distill.signal}": self.measures_log_probs}
        by_function = self.rollout.selects_by_function
        rewards = {
            "policy.weight": weight > 0,
            f"distill.rule={distill.rule}": self.objective == "self_distillation"
            and distill.rule not in ("uniform", "sod"),
            hints: self.data.solutions in ("peer", "peer_or_feedback"),
            f"rollout.select={self.rollout.select}": self.rollout.select != "none" and not by_function,
        }
        others = {
            hints: self.data.hints_follow_responses or self.data.solutions == "skill",
            f"rollout.select={self.rollout.select}": by_function,
            "distill.weight": distill.weight != 1,
            f"loss.normalize={loss.normalize}": loss.normalize != "tokens",
            "loss.skip_first_tokens": loss.skip_first_tokens > 0,
        }
        for key in dict.fromkeys(key for part in (ratios, rewards, others) for key, is_set in part.items() if is_set):
            require(
                not self.logged and self.objective != "sft",
                f"{key} weighs the tokens of sampled responses, but "
                + ("objective=sft" if self.objective == "sft" else "conversations.responses=logged")
                + " samples nothing",
            )
        longest = self.rollout.max_new_tokens
        require(
            loss.skip_first_tokens < longest or self.rollout.replay is not None,
            f"loss.skip_first_tokens must be below rollout.max_new_tokens={longest}, or no token of a response is "
            f"trained on, got {loss.skip_first_tokens}",
        )
        for key in (key for key, is_set in rewards.items() if is_set):
            require(
                self.data.kind == "problems" and self.rollout.num_samples >= 2,
                f"{key} compares the responses to one problem: it needs data.kind=problems and at least 2 for "
                f"rollout.num_samples, got {self.data.kind} and {self.rollout.num_samples}",
            )
        for key in (key for key, is_set in ratios.items() if is_set):
            self._check_correction(key)
        require(
            self.rollout.select != "confidence"
            or (loss.rollout_correction == "none" and not any(ratios.values()) and self.data.solutions == "given"),
            "rollout.select=confidence edits responses, whose probability when they were sampled is then unknown, and "
            "the given solution: it needs data.solutions=given, loss.rollout_correction=none, policy.weight=0 and "
            "distill.signal=full",
        )
        require(
            distill.rule != "pi_distill" or (self.rollout.view == "privileged" and weight > 0),
            "distill.rule=pi_distill trains on rewards of the teacher's responses: it needs rollout.view=privileged "
            f"and policy.weight above 0, got {self.rollout.view} and {weight:g}",
        )

    def _check_environment(self) -> None:
        name, rollout = f"environment.name={self.environment.name}", self.rollout
        require(
            self.objective != "sft" and self.data.kind == "problems",
            f"{name} replies to sampled responses to problems: it needs data.kind=problems and another objective than "
            f"sft, got {self.data.kind} and {self.objective}",
        )
        require(
            rollout.guidance == "none",
            f"{name} with rollout.guidance=mixed is not possible: set rollout.guidance=none",
        )
        turns = f"environment.max_turns={self.environment.max_turns}"
        for key, value, default in (
            ("rollout.select", rollout.select, "none"),
            ("data.solutions", self.data.solutions if self.data.compares_responses else "given", "given"),
            ("distill.rule", self.distill.rule if self.distill.rule in ("scope", "uni_opd") else "uniform", "uniform"),
        ):
            require(
                self.environment.max_turns == 1 or value == default,
                f"{key}={value} compares responses to one prompt, but with {turns} the responses to a problem follow "
                f"different conversations: set {key}={default} or environment.max_turns=1",
            )

    def _check_correction(self, key: str) -> None:
        rollout = self.rollout
        require(self.objective != "sft", f"{key} corrects samples, but objective=sft samples nothing")
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
