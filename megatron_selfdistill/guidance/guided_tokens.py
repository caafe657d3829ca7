# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tokens of guided rollouts: they are sampled from the mixed target of several contexts of one response."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_selfdistill.loss.joint_anchor import joint_anchor, shared_mix
from megatron_selfdistill.loss.sharded.contrast import contrast, row_log_sums
from megatron_selfdistill.loss.sharded.target_solution import TargetSolution, solve_target
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, vocab_entropy
from megatron_selfdistill.loss.target import Target, mixed_logits
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.sampling import invert_cdf, token_log_probs

# Elements of one float64 temporary: about what a core keeps in its cache, or what fills an accelerator.
_MAX_MIXED_LOGITS = {"cpu": 2**20, "other": 2**24}
CONTROL = "control "
"""The start of the roles of controls, ``control 0`` and so on."""
ROLES = ("student", "teacher", "reference")
"""The roles of a guided request's contexts, beside those of controls.  The teacher's context has a prompt of its own;
the reference reads the student's prompt with other weights; controls are the teacher after prompts of their own."""


@dataclass(frozen=True)
class GuidedParams(SamplingParams):
    """The distribution of a token, also of guided responses."""

    target: Target = field(default_factory=lambda: Target(anchor="student"))
    """Target from which guided responses are sampled: a mix of the logits under several contexts."""
    loss_backend: str | None = None
    """Implementation that solves for the target of guided responses (``loss.backend``)."""


@dataclass(frozen=True)
class MixedTokens:
    """One token for each of b groups of contexts; log-probabilities are ``[b]`` float64, in nats."""

    token_ids: Tensor
    """Sampled token ids ``[b]`` int64."""
    student_log_probs: Tensor
    """Log softmax(l_S) of each token."""
    teacher_log_probs: Tensor
    """Log softmax(l_T) of each token."""
    mixed_log_probs: Tensor
    """Log q of each token; 0 where greedy."""


def select_mixed_tokens(
    student_logits: Tensor,
    teacher_logits: Tensor,
    uniforms: Tensor,
    target: Target,
    *,
    greedy: bool,
    reference_logits: Tensor | None = None,
    control_logits: Tensor | None = None,
    backend: str | None = None,
    num_ids: int | None = None,
) -> MixedTokens:
    """Sample one token per group of rows from the mixed target, by inverting its cumulative distribution in float64.

    token = min {v : sum_{i <= v} q_i > uniform}, with log q = log_softmax(beta m), m = w l_T + l_S, or w l_T + l_R
    with a reference, or w (l_T - c) in place of w l_T with controls, and the beta that `loss.solve_target` finds,
    whatever rule ``target`` names; greedy: the argmax of m, the lowest id among equals.  Equal logits in all rows give
    q = softmax(l_S), from which `base.select_tokens` samples.

    Shapes: all logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1), unused
    when greedy.  ``reference_logits``: given if and only if the target's anchor has a reference.  ``control_logits [K,
    b, V]``: given with controls.  A row with NaN gives a valid token with log-probability NaN.  ``backend`` is the
    backend of `solve_target`.  ``num_ids``: as in `SamplingParams`; other ids have q = 0, and the rest of q is
    renormalised.
    """
    others = student_logits if reference_logits is None else reference_logits
    controls = student_logits.new_empty(0, *student_logits.shape) if control_logits is None else control_logits
    limit = _MAX_MIXED_LOGITS["cpu" if student_logits.device.type == "cpu" else "other"]
    rows = max(1, limit // max(1, student_logits.size(1)))
    parts = [values.split(rows) for values in (student_logits, teacher_logits, others, uniforms)]
    parts.append(controls.split(rows, dim=1))

    def select(
        of_student: Tensor, of_teacher: Tensor, of_other: Tensor, some: Tensor, of_controls: Tensor
    ) -> tuple[Tensor, ...]:
        student, teacher = of_student.double(), of_teacher.double()
        anchor = joint_anchor(student, of_other.double(), target) if target.has_reference else student
        if len(of_controls):
            of_teacher = contrast(teacher, of_controls, row_log_sums(of_controls.double(), of_controls.size(-1)))
        mix = mixed_logits(anchor, of_teacher.double(), *target.mix_weights)
        if greedy:
            tokens = mix[:, :num_ids].argmax(-1)  # torch: "the indices of the first maximal value"
            mixed_log_probs = mix.new_zeros(mix.size(0))
        else:
            solution = _solution(of_student, of_teacher, of_other, mix, target, backend)
            # The normaliser has the accuracy of float32 sums; `invert_cdf` divides by what remains of it.
            log_q = torch.addcmul(-solution.log_normaliser[:, None], mix, solution.beta[:, None])
            tokens, mixed_log_probs = invert_cdf(log_q.exp_()[:, :num_ids], some)
        return tokens, token_log_probs(student, tokens), token_log_probs(teacher, tokens), mixed_log_probs

    return MixedTokens(*map(torch.cat, zip(*(select(*some) for some in zip(*parts, strict=True)), strict=True)))


def guided_roles(target: Target) -> tuple[str, ...]:
    """Return the roles of the contexts that a guided response has under ``target``.

    The student's context is among them: ``Response.log_probs`` are the student's, whatever the target mixes.
    """
    return (*ROLES[: 2 + target.has_reference], *(f"{CONTROL}{k}" for k in range(target.num_controls)))


def _solution(
    student_logits: Tensor,
    teacher_logits: Tensor,
    other_logits: Tensor,
    mix: Tensor,
    target: Target,
    backend: str | None,
) -> TargetSolution:
    """Return the beta and the normaliser of every token; ``mix [b, V]`` float64 is m."""
    vocab = VocabShard(0, mix.size(-1), mix.size(-1))
    if not target.has_reference:
        return solve_target(student_logits, teacher_logits, target, vocab, backend=backend)
    # With a reference, the loss takes the mix of both frozen models in the unit of logits in place of the teacher.
    dtype = torch.float32
    for logits in (student_logits, teacher_logits, other_logits):
        dtype = torch.promote_types(dtype, logits.dtype)
    anchor, folded, wanted = other_logits, mix / target.geometric_k, None
    if target.reference_share:
        anchor = joint_anchor(student_logits, other_logits, target)
        folded = shared_mix(other_logits, teacher_logits, target)
    folded = folded.to(dtype)
    if target.needs_reference_entropy:
        wanted = vocab_entropy(anchor, vocab, backend=backend)
    return solve_target(student_logits.to(dtype), folded, target, vocab, reference_entropy=wanted, backend=backend)
