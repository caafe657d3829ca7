# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of two terms, w D(p, q) - a log p(token), written out in float64 for autograd, with nasty rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from logit_pairs import divergence, entropy
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.loss import Divergence, Target
from megatron_selfdistill.loss.weighting import Coefficients

VOCAB_SIZE, PADDED_VOCAB_SIZE = 370, 512  # over 4 ranks: 128, 128, 114 and 0 valid columns
TARGETS = {
    "matched": Target(k_max=None, anchor="student"),
    "capped": Target(anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
    "with a reference": Target(anchor="reference"),
}
DIVERGENCES = {"reverse": Divergence("reverse_kl"), "forward": Divergence("forward_kl"), "jsd": Divergence("jsd", 0.3)}
TOKENS = torch.tensor([0, 127, 128, 255, 256, 369, 20, 9, 40, 7, 200, 369])
"""The response tokens of `rows`: the first and the last column of every shard are among them.  The token of row 6 does
not exist, so that its log-prob is -inf; its coefficient a is 0."""


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [12, VOCAB_SIZE] of student, teacher and reference.

    The student is sharp, flat, certain of the response token and certain of another one; student and teacher are equal
    or far apart; a row is shifted by 1e4, and columns of a row do not exist.
    """
    generator = torch.Generator().manual_seed(11)
    scale = torch.linspace(0.3, 5.0, len(TOKENS), dtype=torch.float64)[:, None]
    student, teacher, reference = (
        scale * torch.randn(len(TOKENS), VOCAB_SIZE, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    teacher[1] = reference[1] = student[1]
    student[2] = 0.0
    student[3, TOKENS[3]] = 40.0
    student[4, 17] = 60.0
    student[5] += 1e4
    for logits in (student, teacher, reference):
        logits[6, 10:300] = -torch.inf
    student[7], teacher[7] = torch.linspace(-30, 10, VOCAB_SIZE), torch.linspace(10, -30, VOCAB_SIZE)
    student, teacher, reference = (logits.to(dtype) for logits in (student, teacher, reference))
    return student, teacher, reference


def coefficients(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w >= 0 and a of either sign [num_tokens]: one of them, both and none of them are 0 at some tokens."""
    generator = torch.Generator().manual_seed(12)
    w = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * 2
    a = torch.randn(num_tokens, generator=generator, dtype=torch.float64) * 2
    w[::4], a[::6] = 0.0, 0.0
    return w.to(dtype), a.to(dtype)


@dataclass(frozen=True)
class GivenCoefficients:
    """Token coefficients w and a times min(p / mu, 2), where a clip sets a to 0 at the ratios above 2.

    All are [R_total], in the order of ``PackedBatch.response_tokens``.
    """

    w: Tensor
    a: Tensor
    log_mu: Tensor

    @classmethod
    def of(cls, contexts: Iterable[ContextPair]) -> GivenCoefficients:
        """Return coefficients that depend on the problem and on the place in the response, and on no layout."""
        parts = []
        for context in contexts:
            generator = torch.Generator().manual_seed(zlib.crc32(context.problem_id.encode()))
            random = torch.rand(3, len(context.response), generator=generator, dtype=torch.float64)
            parts.append(torch.stack([2 * random[0], 4 * random[1] - 2, -3 - 3 * random[2]]))
            parts[-1][0, 1::4], parts[-1][1, 2::5] = 0.0, 0.0
        return cls(*torch.cat(parts, 1)) if parts else cls(*torch.zeros(3, 0, dtype=torch.float64))

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the coefficients of some of the tokens."""
        assert not student_log_prob.requires_grad
        ratio = (student_log_prob.double() - self.log_mu[response_ids]).exp()
        clipped = ratio > 2
        policy = torch.where(clipped, 0.0, self.a[response_ids] * ratio)
        return Coefficients(self.w[response_ids].to(student_log_prob), policy.to(student_log_prob), clipped)


def as_teacher(target: Target, teacher: Tensor, reference: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what `distillation_loss` takes: the logits of the teacher or of the mix, and the reference's entropy."""
    if not target.is_anchored:
        return teacher, None
    w = target.teacher_weight
    return (w * teacher + reference) / (1 + w), entropy(reference.log_softmax(-1))


def token_losses(
    student: Tensor,
    teacher: Tensor,
    reference: Tensor,
    tokens: Tensor,
    target: Target,
    kind: Divergence,
    w: Tensor,
    a: Tensor,
) -> Tensor:
    """Return the loss [T] of every token by the definition in float64, whose gradient flows to ``student``."""
    s, t, r = (logits.double().clamp(min=-1e5) for logits in (student, teacher, reference))
    log_p = s.log_softmax(-1)
    log_q = _log_q(s.detach(), t, r, target)
    return w.double() * divergence(log_p, log_q, kind) - a.double() * log_p.gather(1, tokens[:, None])[:, 0]


def _log_q(s: Tensor, t: Tensor, r: Tensor, target: Target) -> Tensor:
    """Return the target's log-probs, with beta by bisection where the entropy is matched."""
    if target.rule == "teacher_alone":
        return t.log_softmax(-1)
    anchor, weight = r if target.is_anchored else s, target.teacher_weight
    mix = weight * t + anchor
    wanted = entropy(anchor.log_softmax(-1)).clamp(min=1e-6)
    low = torch.full_like(wanted, 1 / 16 / (1 + weight)).log()  # the smallest beta that the loss tries
    high = low + torch.tensor(256.0).double().log()
    for _ in range(90):
        middle = (low + high) / 2
        soft = entropy((middle.exp()[:, None] * mix).log_softmax(-1)) > wanted
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    beta = low.exp() if target.k_max is None else low.exp().clamp(min=1 / (1 + weight))
    return (beta[:, None] * mix).log_softmax(-1)
