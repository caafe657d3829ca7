# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The definition of the loss of a response token, on full rows of logits: its target, which is the method.

    p = softmax(s)               the student; s: the student's logits of the token
    m = w t + a                  the mix; t: the teacher's logits of the token, w: teacher_weight
    q = softmax(m / k)           the target, a constant: no gradient flows through it
    k : H(q) = H(softmax(a))     one k per token, k <= k_max; H: the entropy in nats
    loss = D(p, q)               the divergence between student and target

The anchor a is the logits r of frozen weights that read the student's own context, or with anchor=student s.  While
the student learns, a mix with s follows the student, and a mix with r stands still.  With match=student k gives q the
entropy H(p) instead of that of softmax(r).

With controls the mix is

    m = w (t - c) + a                      k <= k_max; at k = 1 equal t and c give q = softmax(a)
    c = log mean over j of softmax(c_j)    c_j: the teacher's logits after the hint of another problem j

What any hint makes the model do is in t and in c alike and cancels.  t - c is the information between the token and
this hint, given that there is a hint.

k is the temperature of the mix, and beta = 1 / k is its inverse, for which the code solves.  H(softmax(beta m)) falls
monotonically in beta, from log(number of valid columns) to log(number of ties at the maximum), so there is one root,
which this file finds by bisection.  `loss/sharded` computes the same on vocabulary shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.divergence import (
    FLOOR,
    forward_kl_terms,
    forward_share,
    q_minus_p,
    reverse_kl_gradient,
    reverse_kl_terms,
)
from megatron_selfdistill.loss.joint_anchor import joint_anchor
from megatron_selfdistill.loss.jsd_and_renyi import (
    jsd_gradient,
    jsd_terms,
    log_mixture_over_p,
    renyi_gradient,
    renyi_sums,
    renyi_value,
)
from megatron_selfdistill.loss.target import (
    MIN_ENTROPY,
    Divergence,
    Target,
    check_arguments,
    check_controls,
    mixed_logits,
    status_given,
    token_status,
)


@dataclass(frozen=True)
class TargetDistribution:
    """log q [..., V] and beta [...] in the dtype of the logits, at least float32; status [...] int64, see `Status`."""

    log_q: Tensor
    beta: Tensor
    status: Tensor


@torch.no_grad()
def mixed_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Target | None = None,
    reference_logits: Tensor | None = None,
    control_logits: Tensor | None = None,
) -> TargetDistribution:
    """Return the target of every token, with beta by bisection to machine precision; no gradient flows through it.

    Shapes: all logits [..., V], full rows, -inf at columns that do not exist.  float64 gives float64; what is narrower
    than float32 is computed in float32.  A token whose logits hold NaN or +inf has beta NaN and log_q NaN.
    target: None is `Target()`, as for `self_distillation_loss`.
    ``reference_logits``: given if and only if the target's anchor is a reference, as that of `Target()`, or has a share
    of one.
    ``control_logits``: [K, ..., V], given if and only if the target has K = `Target.num_controls` controls.
    Raises: ValueError if the logits have different shapes, or if those of the reference or of the controls are missing
    or not asked for.
    """
    target = Target() if target is None else target
    check_arguments("mixed_target", locals())
    check_controls("mixed_target", "control_logits", control_logits, target)
    if target.has_reference != (reference_logits is not None):
        raise ValueError(
            f"mixed_target: reference_logits must be given where the anchor has a reference, and only there; "
            f"got {'none' if reference_logits is None else 'some'} with {target}."
        )
    anchor_logits = student_logits
    if reference_logits is not None:
        anchor_logits = joint_anchor(student_logits, reference_logits, target)
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher, anchor = (logits.to(dtype) for logits in (student_logits, teacher_logits, anchor_logits))
    if control_logits is not None:
        control = control_logits.to(dtype).log_softmax(-1).logsumexp(0) - math.log(len(control_logits))
        teacher = torch.where(torch.isneginf(teacher), teacher, teacher - control)
    mix = mixed_logits(anchor, teacher, *target.mix_weights)
    wanted = entropy((anchor if target.matches_reference else student).log_softmax(-1))
    if target.given_beta is not None:
        beta = torch.full_like(wanted, target.given_beta)
        return TargetDistribution((beta[..., None] * mix).log_softmax(-1), beta, status_given(beta))
    low, high = target.beta_range
    beta = _matching_beta(mix, wanted.clamp(min=MIN_ENTROPY), low, high)
    log_q = (beta[..., None] * mix).log_softmax(-1)
    status = token_status(wanted, entropy(log_q), beta, low, high, target.lowest_is_bound)
    return TargetDistribution(log_q, beta, status)


def entropy(log_probs: Tensor) -> Tensor:
    """Return H in nats over the last axis; a column whose log-probability is -inf adds nothing."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _matching_beta(mix: Tensor, wanted: Tensor, low: float, high: float) -> Tensor:
    """Return the beta in [low, high] with H(softmax(beta mix)) = wanted, or the nearer end; NaN for rows with NaN."""

    def too_soft(beta: Tensor) -> Tensor:
        return entropy((beta[..., None] * mix).log_softmax(-1)) > wanted

    lowest, highest = torch.full_like(wanted, low), torch.full_like(wanted, high)
    below, above = ~too_soft(lowest), too_soft(highest)
    left, right = lowest.log(), highest.log()
    for _ in range(60):  # log(high / low) <= 5.6, so 60 halvings reach 5e-18
        middle = (left + right) / 2
        soft = too_soft(middle.exp())
        left, right = torch.where(soft, middle, left), torch.where(soft, right, middle)
    beta = torch.where(below, lowest, torch.where(above, highest, ((left + right) / 2).exp()))
    # Comparisons with NaN are false and would turn NaN into an ordinary number.
    return torch.where(torch.isfinite(wanted + mix.amax(-1)), beta, torch.nan)


def divergence(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return D(p, q) in nats of every row: [..., V], [..., V] -> [...].

    The result equals ``(p * (log_p - log_q)).sum(-1)`` for reverse KL, ``(q * (log_q - log_p)).sum(-1)`` for forward
    KL, and ``lam * KL(q, M) + (1 - lam) * KL(p, M)`` for the JSD.  With `Divergence.forward_above` it is reverse KL, to
    which forward KL is added for rows whose H(q) is above that number.  `Divergence.order` makes it Renyi's divergence.
    log_p, log_q: normalised, any float dtype, -inf where a column does not exist.
    Reverse KL is +inf where q is 0 and p is not, forward KL where p is 0 and q is not.
    """
    check_arguments("divergence", locals())
    if divergence.forward_above is not None:
        reverse, forward = (_kl_of_kind(log_p, log_q, kind) for kind in ("reverse_kl", "forward_kl"))
        return torch.where(forward_share(entropy(log_q), divergence.forward_above) > 0, reverse + forward, reverse)
    if divergence.is_renyi:
        return _renyi(log_p, log_q, divergence)
    if divergence.kind != "jsd":
        return _kl_of_kind(log_p, log_q, divergence.kind)
    p, q, d = probabilities_and_ratio(log_p, log_q)
    return jsd_terms(p, q, d, divergence.jsd_lambda).sum(-1)


def _kl_of_kind(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """Return KL(p || q) for "reverse_kl", KL(q || p) for "forward_kl"."""
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if kind == "reverse_kl":
        value, infinite = reverse_kl_terms(p, q, d), torch.isneginf(log_q) & ~torch.isneginf(log_p)
    else:
        value, infinite = forward_kl_terms(p, q, d), torch.isneginf(log_p) & ~torch.isneginf(log_q)
    return value.sum(-1).masked_fill(infinite.any(-1), torch.inf)


def divergence_gradient(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return dD / ds for the student's logits s of p = softmax(s), with q constant: [..., V].

        reverse KL   p ((log p - log q) - KL(p || q))
        forward KL   p - q
        JSD          (1 - lam) p (log(p / M) - KL(p || M))
        Renyi        b / (alpha - 1) (w - p),  w = p^b q^(1 - b) / sum,  b = alpha, with forward KL 1 - alpha

    With `Divergence.forward_above`, the gradient of forward KL is added to that of reverse KL where H(q) is above it.
    The gradient of a row sums to 0 over the vocabulary.  A row whose reverse KL is infinite has a gradient of inf and
    NaN.
    """
    check_arguments("divergence_gradient", locals())
    if divergence.is_renyi:
        return renyi_gradient(log_p, log_q, _renyi(log_p, log_q, divergence), divergence)
    p, q, d = probabilities_and_ratio(log_p, log_q)
    if divergence.kind == "forward_kl":
        return -q_minus_p(p, q, d)
    if divergence.kind == "jsd":
        return jsd_gradient(p, d, divergence.jsd_lambda, -(p * log_mixture_over_p(d, divergence.jsd_lambda)).sum(-1))
    infinite = (torch.isneginf(log_q) & ~torch.isneginf(log_p)).any(-1)
    gradient = reverse_kl_gradient(p, d, -(p * d).sum(-1).masked_fill(infinite, -torch.inf))
    if divergence.forward_above is None:
        return gradient
    return gradient - forward_share(entropy(log_q), divergence.forward_above)[..., None] * q_minus_p(p, q, d)


def probabilities_and_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and d = log q - log p, finite also where a log-probability is -inf; NaN stays NaN."""
    log_p, log_q = log_p.clamp(min=FLOOR), log_q.clamp(min=FLOOR)
    return log_p.exp(), log_q.exp(), log_q - log_p


def _renyi(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return the Renyi divergence of every row."""
    small, log_sum = renyi_sums(log_p, log_q, divergence).unbind(-1)
    return renyi_value(small, log_sum, divergence)
