# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights of tokens against their definitions in plain Python, and the estimate that the reach makes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.token_weights import evidence, iw_opd, reach, sums_before

NEVER = -math.inf
SHORT = [([-1.0], [-2.0]), ([NEVER], [-1.0]), ([-3.0, -1.0], [-1.0, -1.0])]
NASTY = [
    ([NEVER, -1.0, -1.0], [-1.0, -3.0, -3.0]),
    ([-1.0, -2.0, NEVER, -1.0], [-1.5, -1.0, -1.0, -9.0]),
    ([-1.0, -1.0, -2.0, -1.0], [NEVER, -1.0, -0.5, -1.0]),
    ([-1.0, NEVER, -1.0, -1.0], [NEVER, NEVER, -1.0, -1.0]),
    ([-700.0, -0.5, -0.5, -0.5], [-0.5, -700.0, -0.25, -0.5]),
    ([-0.75] * 3000 + [-0.25] * 3000, [-0.5] * 6000),
    ([-900.0, -0.5] * 2000, [-0.5, -900.25] * 2000),
]
"""Log-probs of each response under q and under mu or p.  Thousands of them neither underflow nor overflow."""


def joined(responses: list) -> tuple[Tensor, Tensor, list[int]]:
    q, mu = (torch.tensor([x for one in responses for x in one[i]], dtype=torch.float64) for i in (0, 1))
    return q, mu, [len(one[0]) for one in responses]


def product(q: list[float], mu: list[float], exponent: float) -> float:
    """Return min(1, the product of q / mu) ** exponent; where q and mu both exclude a token, q decides."""
    if NEVER in q or NEVER in mu:
        return 0.0 if NEVER in q else 1.0
    return math.exp(exponent * min(0.0, math.fsum(q) - math.fsum(mu)))


@pytest.mark.parametrize("exponent", [0.25, 1.0, 2.0])
def test_the_reach_is_the_truncated_product_over_the_earlier_tokens_of_the_response(exponent):
    wanted = [product(q[:i], mu[:i], exponent) for q, mu in SHORT + NASTY for i in range(len(q))]
    found = reach(*joined(SHORT + NASTY), exponent=exponent)
    assert found.dtype == torch.float64 and min(wanted) == 0 < max(wanted) == 1
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    assert reach(torch.zeros(0), torch.zeros(0), []).tolist() == []
    assert reach(torch.zeros(1), torch.zeros(1), [0, 1, 0]).tolist() == [1.0]


def test_responses_that_the_target_wrote_have_weights_of_1_bit_for_bit():
    q, _, lengths = joined([([-0.1 * i for i in range(1, 900)],) * 2, ([-3.0],) * 2])
    assert torch.equal(reach(q, q, lengths), torch.ones_like(q))


def discrepancies(q: list[float], p: list[float]) -> list[float]:
    return [0.0 if a == b else abs(a - b) for a, b in zip(q, p, strict=True)]


@pytest.mark.parametrize("gain", [0.0, 0.5, 3.0])
def test_iw_opd_is_the_share_of_the_discrepancy_that_is_still_to_come(gain):
    wanted = []
    for q, p in SHORT + NASTY:
        each = discrepancies(q, p)
        before = [math.fsum(each[:i]) for i in range(len(each))]
        total = math.fsum(each)
        wanted += [1 + gain * (1 - (1.0 if math.isinf(one) else one / total if total else 0.0)) for one in before]
    torch.testing.assert_close(
        iw_opd(*joined(SHORT + NASTY), gain=gain), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert iw_opd(*joined([([-1.0, -2.0],) * 2]), gain=gain).tolist() == [1 + gain] * 2, "nobody differs"


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_evidence_is_a_target_that_finds_the_token_at_least_as_likely(margin):
    q, p, _ = joined(SHORT + NASTY)
    wanted = [float(a >= b + margin) for a, b in zip(q.tolist(), p.tolist(), strict=True)]
    assert evidence(q, p, margin=margin).tolist() == wanted and 0 < sum(wanted) < len(wanted)


# The estimate: all texts of 3 tokens over 3 tokens, of a student and a teacher that are tables.

TEXTS = list(itertools.product(range(3), repeat=3))
PREFIXES = [prefix for length in range(3) for prefix in itertools.product(range(3), repeat=length)]
ROWS = torch.tensor([[PREFIXES.index(text[:i]) for i in range(3)] for text in TEXTS])
TOKENS = torch.tensor(TEXTS)


def tables() -> tuple[Tensor, Tensor]:
    """Return logits [13, 3] of student and teacher: a row for each prefix; they differ by up to several nats."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (2 * torch.randn(13, 3, generator=generator, dtype=torch.float64) for _ in "st")
    return student, teacher


def sampled(logits: Tensor) -> Tensor:
    """Return log-probs [27, 3] of the tokens of all texts."""
    return logits.log_softmax(-1)[ROWS].gather(-1, TOKENS[..., None])[..., 0]


def gradient(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the sum over all texts and tokens of ``weights [27, 3]`` times KL(teacher || student)."""
    leaf = student.clone().requires_grad_()
    stats = distillation_loss(
        leaf[ROWS.flatten()],
        teacher[ROWS.flatten()],
        TOKENS.flatten(),
        target=Target("teacher_alone", anchor="student"),
        divergence=Divergence("forward_kl"),
        vocab=VocabShard(0, 3, 3),
    )
    (stats.loss * weights.flatten()).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_the_weighted_gradient_over_own_texts_is_the_gradient_over_the_texts_of_the_teacher():
    """Forward KL, in expectation; with the truncation, each place counts as often as the rarer visitor comes there."""
    student, teacher = tables()
    log_p, log_t = sampled(student), sampled(teacher)
    of_student, of_teacher = (log.sum(1, keepdim=True).exp().expand(27, 3) for log in (log_p, log_t))
    wanted = gradient(student, teacher, of_teacher)
    ratios = sums_before((log_t - log_p).flatten(), [3] * 27).exp().view(27, 3)
    torch.testing.assert_close(gradient(student, teacher, of_student * ratios), wanted, rtol=1e-10, atol=1e-13)
    truncated = reach(log_t.flatten(), log_p.flatten(), [3] * 27).view(27, 3)
    assert torch.equal(truncated, ratios.clamp(max=1)) and (ratios > 1).any()
    places = torch.zeros(3, 13, dtype=torch.float64)
    for weights, found in zip((of_student, of_teacher, of_student * truncated), places, strict=True):
        found.index_add_(0, ROWS.flatten(), weights.flatten())
    torch.testing.assert_close(places[2], torch.minimum(*places[:2]), rtol=1e-12, atol=0)
    own = reach(log_t.flatten(), log_t.flatten(), [3] * 27).view(27, 3)
    assert torch.equal(gradient(student, teacher, of_teacher * own), wanted), "guided texts need no special case"
