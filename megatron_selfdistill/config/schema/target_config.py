# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``target`` and ``teacher`` of the schema: the distribution that the student is trained towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from megatron_selfdistill.choices import ANCHORS, DIVERGENCES, FUSED_MODES, LOSS_BACKENDS, TARGET_RULES
from megatron_selfdistill.config.schema.data_config import plays_episodes
from megatron_selfdistill.config.schema.field_checks import Part, require
from megatron_selfdistill.config.schema.method_config import GIVEN, HINTED
from megatron_selfdistill.config.schema.ranges import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    above,
    at_least,
    at_most,
    below,
)


@dataclass(frozen=True)
class LossConfig(Part, section="loss", free="backend fused fused_chunk_tokens max_logits_gb"):
    """The divergence between the target q and the student p, in nats per response token."""

    divergence: Annotated[str, OneOf(DIVERGENCES)] = "reverse_kl"
    """The divergence: reverse_kl = KL(p || q), forward_kl = KL(q || p), or jsd (generalised Jensen-Shannon)."""
    jsd_lambda: Annotated[float, above(0), below(1)] = 0.5
    """Weight of q in the mixture of the divergence jsd."""
    backend: Annotated[str, OneOf(LOSS_BACKENDS)] | None = None
    """The implementation of the loss: torch, or triton (kernels for NVIDIA GPUs).  Null takes triton where the logits
    are on a GPU and triton is installed, otherwise torch; the log names the choice and the reason."""
    rollout_correction: Annotated[str, OneOf(("none", "truncated", "truncated_sequence"))] = "none"
    """Importance weight of each token's divergence: none, truncated: min(p / mu, rollout_correction_cap), where p is
    the student's probability of the token and mu its probability under the distribution that sampled it (another
    engine, or the target), or truncated_sequence: the same with the mean of p / mu over the tokens of the response."""
    rollout_correction_cap: PositiveFloat = 2.0
    """The largest importance weight under rollout_correction."""
    normalize: Annotated[str, OneOf(("tokens", "sequences", "prompts"))] = "tokens"
    """The things that the loss is a mean over: tokens (all response tokens alike), sequences (the tokens of each
    response, then the responses) or prompts (the sum over the tokens of all responses to a problem, then the
    problems)."""
    skip_first_tokens: NonNegativeInt = 0
    """Number of tokens at the start of each response that are not trained on."""
    fused: Annotated[str, OneOf(("none", *FUSED_MODES))] | None = None
    """The computation of the output layer: none (all logits of a microbatch, of student and teacher, exist at once), or
    together with the loss in chunks of tokens: keep_gradient (the gradient of the student's logits is kept until
    backward) or low_memory (backward computes the logits again, with half as many GEMMs more).  Null takes the first of
    none, keep_gradient and low_memory that stays within max_logits_gb, or low_memory.  Own solutions are scored in the
    same chunks.  Only self-distillation can be fused; the baselines cannot."""
    fused_chunk_tokens: PositiveInt = 4096
    """Number of response tokens in a chunk of the fused output layer."""
    max_logits_gb: NonNegativeFloat | None = None
    """Memory that the logits of the largest microbatch may take on a rank under fused=null, in GiB; null is 1/20 of
    cluster.gpu_memory_gb."""


MAX_K = 10**6
TeacherWeight = Annotated[
    float,
    at_least(0),
    at_most(1000),  # a larger weight leaves nothing of the anchor
]


@dataclass(frozen=True)
class TargetConfig(Part, section="target"):
    """The target q = softmax((w * teacher_logits + anchor_logits) / k)."""

    rule: Annotated[str, OneOf(TARGET_RULES)] = "entropy_matched"
    """The rule for k, the temperature of the mix: entropy_matched (per token), fixed, batch (one k per step), or
    teacher_alone (no mix: the target is the teacher)."""
    teacher_weight: TeacherWeight = 0.75
    """Weight w of the teacher's logits; the weight of the anchor's logits is 1."""
    k_max: Annotated[Any, OneOf((None, "1 + w"), or_number=True), above(0), at_most(MAX_K)] = "1 + w"
    """Upper bound of k: '1 + w', a number, or null (no bound: the entropies always match)."""
    k: Annotated[float, at_least(0.01), at_most(MAX_K)] | None = None
    """The value of k under rule=fixed; null is 1 + w."""
    anchor: Annotated[Any, OneOf(("auto", *ANCHORS), or_number=True), above(0), below(1)] = "auto"
    """The model that the teacher is mixed with, on the student's context: reference (the weights at the start of the
    run, so that the target stands still with a frozen teacher, whose weights are also the reference's; with another
    teacher the reference is one more copy of the weights), student (the weights that are trained), or auto: student
    where all solutions of the data are one text, such as an instruction, which tells nothing about a single problem
    that could leak, and reference elsewhere.  The run's config.yaml states which of both it is.  A number between 0 and
    1 is the reference's share in a mix of the logits of both, which moves and stays tied to the start."""
    match: Annotated[str, OneOf(ANCHORS)] | None = None
    """The model whose entropy the target has: reference (needs anchor=reference) or student; null is the anchor."""
    control: Annotated[str, OneOf(("auto", "other", "none"))] = "none"
    """What the teacher's logits t are compared with: none, or other: the teacher reads each response also after the
    hints of num_controls other problems, and w (t - c) takes the place of w t, where c is the log of the mean of these
    probabilities.  What any hint makes the model do then cancels.  auto is none where no other hint makes sense (all
    hints are one text, or they are no solutions of the data), and other elsewhere."""
    num_controls: Annotated[int, at_least(1), at_most(64)] = 2
    """The number of controls of a response.  Where the data have fewer different hints, some of them count twice."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where the target would be another one than the keys describe."""
        require(
            self.k is None or self.rule == "fixed",
            f"target.k={self.k} is the k of target.rule=fixed, but target.rule is {self.rule}: set target.rule=fixed, "
            "or target.k=null",
        )
        require(
            isinstance(self.k_max, str | None) or self.rule in ("entropy_matched", "batch"),
            f"target.k_max={self.k_max} bounds the k that target.rule=entropy_matched and batch solve for, but "
            f"target.rule is {self.rule}: set target.k_max=null",
        )
        require(
            self.match in (None, "student", self.anchor),
            f"target.match must be null, student or target.anchor, got {self.match!r} with target.anchor={self.anchor}",
        )
        require(
            self.anchor == "student" or self.rule != "teacher_alone",
            "target.rule=teacher_alone mixes the teacher with nothing: set target=teacher_alone, which also sets "
            "target.anchor=student",
        )
        missing = why_no_control(config)
        require(
            self.control != "other" or missing is None,
            f"target.control=other compares hints of different problems, but {missing}: set target.control=none",
        )

    def require_no_k(self, key: str) -> None:
        """Raise `ConfigError` where one k or k_max is set beside ``key``, a second weight of a teacher's logits."""
        bound, value = ("k", self.k) if self.rule == "fixed" else ("k_max", self.k_max)
        require(
            value is None or isinstance(value, str),
            f"target.{bound}={value} belongs to one teacher weight, and {key} sets another: set target.{bound}=null",
        )


def shows_solutions(config: Any) -> bool:
    """Return whether the hints of a run with this `Config` are the solutions of the data, each of a single problem."""
    needs, data = config.needs, config.data
    is_single = data.kind == "problems" and not plays_episodes(config)
    return is_single and needs.teacher_prompt == HINTED and needs.hint == GIVEN and data.solutions != "none"


def planned_controls(config: Any) -> int:
    """Return the number of controls of a run with this `Config` whose hints differ; 0 for a target without controls."""
    target = config.target
    return 0 if target.control == "none" or why_no_control(config) is not None else int(target.num_controls)


def why_no_control(config: Any) -> str | None:
    """Return why the hints of other problems make no control in a run with this `Config`; None where they do."""
    key = None
    if config.target.rule == "teacher_alone":
        key = "target.rule=teacher_alone mixes the teacher with nothing"
    elif config.data.kind != "problems" or plays_episodes(config):
        key = "the responses are turns, whose hints belong to one conversation"
    elif not shows_solutions(config):
        key = f"the teacher of method.name={config.method.name} sees no solutions of the data"
    elif config.needs.contexts_per_sample > 1:
        key = f"method.name={config.method.name} reads a response in several contexts, each with hints of its own"
    return key or config.why_teachers_differ


@dataclass(frozen=True)
class TeacherConfig(Part, section="teacher", free="offload", fixed="weights"):
    """The weights that score the response with the solution in their context."""

    weights: Annotated[str, OneOf(("frozen", "ema", "current"))] = "frozen"
    """The teacher's weights: frozen (the weights at the start of the run, also those of the reference), ema (a moving
    average of the student's weights) or current (the student's weights themselves).  Beside ema and current, the
    reference of target.anchor=reference is a copy of the weights of its own."""
    ema_decay: Decay = 0.99
    """Decay of the moving average per optimizer step."""
    offload: Annotated[str, OneOf(("none", "cpu"))] = "none"
    """The place of the teacher's weights, and of a reference's own copy, between steps: none (on the device) or cpu (in
    host memory)."""
