# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient of the log-probs beside that of the divergence; test_token_targets.py compares both with float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_layer import PADDED_VOCAB_SIZE, VOCAB_SIZE, Example, relative
from logit_pairs import DIVERGENCES, pair, with_garbage
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.weighting import Coefficients

TOKENS = torch.tensor([0, 127, 128, 255, 256, 369, 20, 9, 40, 7, 200, 369])
"""The first and the last column of every shard of 128 are among them; that of row 6 does not exist."""
W, A = torch.linspace(0, 2, 12, dtype=torch.float64), torch.linspace(-2, 1, 12, dtype=torch.float64)


def rows() -> tuple[Tensor, Tensor]:
    """Return logits [12, VOCAB_SIZE]: rows certain of the response token and of another one, shifted, and cut."""
    student, teacher = pair(11, 12, VOCAB_SIZE)
    teacher[1], student[2] = student[1], 0.0
    student[3, TOKENS[3]], student[4, 17] = 40.0, 60.0
    student[5] += 1e4
    student[6, 10:300] = teacher[6, 10:300] = -torch.inf
    return student, teacher


def computed(kind: str, losses_of: Callable[[TokenStats], Tensor], tokens: Tensor = TOKENS) -> tuple[Tensor, Tensor]:
    """Return the losses that a function of the statistics gives, and their gradient to the student's logits."""
    student, teacher = (with_garbage(logits, PADDED_VOCAB_SIZE) for logits in rows())
    arguments = {"target": Target(anchor="student"), "divergence": DIVERGENCES[kind]}
    vocab, leaf = VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE), student.requires_grad_()
    losses = losses_of(distillation_loss(leaf, teacher, tokens, vocab=vocab, **arguments))
    losses.sum().backward()
    assert leaf.grad is not None and (leaf.grad[:, VOCAB_SIZE:] == 0).all(), "padding takes part in nothing"
    return losses.detach(), leaf.grad[:, :VOCAB_SIZE]


def two_terms(w: Tensor, a: Tensor | None) -> Callable[[TokenStats], Tensor]:
    return lambda stats: Coefficients(w, a).token_losses(stats.loss, stats.student_log_prob)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_log_prob_alone_has_its_own_gradient_and_both_add_up(kind: str) -> None:
    """onehot(token) - p, where nothing uses the loss."""
    _, got = computed(kind, lambda stats: stats.student_log_prob)
    expected = -rows()[0].softmax(-1)
    expected[torch.arange(12), TOKENS] += 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    a = A.where(torch.arange(12) != 6, 0.0)  # its log-prob is -inf
    (losses, both), (alone, of_loss) = computed(kind, two_terms(W, a)), computed(kind, two_terms(W, None))
    torch.testing.assert_close(both, of_loss - a[:, None] * expected, rtol=0, atol=1e-13)
    log_prob = rows()[0].log_softmax(-1).gather(1, TOKENS[:, None])[:, 0].nan_to_num(neginf=0)
    torch.testing.assert_close(losses, alone - a * log_prob, rtol=1e-12, atol=1e-12)


def test_a_token_that_is_no_valid_column_needs_a_coefficient_of_zero() -> None:
    tokens, a = TOKENS.clone(), torch.ones_like(A)
    tokens[:7] = torch.tensor([370, 511, -100, 512, 10**6, -1, 5])
    a[:3] = 0
    losses, gradient = computed("reverse", two_terms(torch.ones_like(W), a), tokens)
    plain, expected = computed("reverse", two_terms(torch.ones_like(W), None))
    assert torch.equal(losses[:3], plain[:3]) and torch.equal(gradient[:3], expected[:3])
    assert losses[3:6].isnan().all() and gradient[3:6].isnan().all()
    assert losses[6:].isfinite().all() and gradient[6:].isfinite().all()


@pytest.mark.parametrize("mode", FUSED_MODES)
@pytest.mark.parametrize("used", ["loss", "student_log_prob"])
def test_the_fused_layer_has_a_gradient_where_nothing_uses_the_loss_or_nothing_uses_the_log_probs(
    mode: str, used: str
) -> None:
    example = Example(True, torch.float64)
    leaves = [example.student.clone().requires_grad_() for _ in range(2)]
    arguments = {"target": Target("teacher_alone", anchor="student"), "divergence": Divergence()}
    arguments |= {"vocab": VocabShard(0, PADDED_VOCAB_SIZE, VOCAB_SIZE)}
    states = leaves[0], example.teacher, example.weight, None, example.tokens
    total = getattr(fused_distillation_loss(*states, **arguments, mode=mode), used).sum()
    if used == "student_log_prob" and mode == "keep_gradient":
        with pytest.raises(ValueError, match=r"keep_gradient holds the gradient of the divergence alone"):
            total.backward()
        return
    total.backward()
    student, teacher = (states @ example.weight[:VOCAB_SIZE].T for states in (leaves[1], example.teacher))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    of_tokens = (
        log_p.gather(1, example.tokens[:, None]) if used == "student_log_prob" else log_p.exp() * (log_p - log_q)
    )
    of_tokens.sum().backward()
    assert leaves[1].grad is not None and relative(leaves[0].grad, leaves[1].grad) < 1e-12
