# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The vocabulary-parallel loss and its gradient on the shards of this node, against float64 on full rows.

The reference follows the definition and shares no code with ``loss/``: it finds beta by bisection and the gradient by
autograd.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from megatron_selfdistill.instruments.selftest.outcome import Figure, Outcome, largest
from megatron_selfdistill.instruments.selftest.tiny import LaunchUnderTest
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, distillation_loss
from megatron_selfdistill.loss.target import Divergence, Target

VOCAB_SIZE, NUM_ROWS = 1009, 48  # a prime: the last shards are partly padding
TARGETS = {
    "k <= 1 + w": Target(anchor="student"),
    "k unbounded": Target(k_max=None, anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
}
DIVERGENCES = {
    "reverse KL": Divergence("reverse_kl"),
    "forward KL": Divergence("forward_kl"),
    "JSD": Divergence("jsd", 0.3),
}
LOSS_BOUND = 1e-5
"""The bound of the error of a loss in nats, relative to 1 + the loss: the rounding of float32 sums."""
GRADIENT_BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 8e-3}
"""The bound of the error of a gradient, relative to the largest gradient of its token: a gradient has the dtype of its
logits, and two roundings of bf16 are 2^-7."""
SMALLEST_SCALE = 1e-3
"""The largest gradient of a token below which the gradient is rounding, as where teacher and student are equal."""


def loss_against_float64(launch: LaunchUnderTest) -> Outcome:
    """Compare every divergence and target in float32 and bf16, at the largest TP that the world allows."""
    grid = launch.grid(launch.cut(tp=launch.largest_tp))
    vocab = VocabShard.from_group(launch.padded_vocab_size(VOCAB_SIZE, grid), VOCAB_SIZE, grid.tp_group)
    figures: list[Figure] = []
    for dtype, gradient_bound in GRADIENT_BOUNDS.items():
        losses, gradients = {}, {}
        for (rule, target), (kind, divergence) in product(TARGETS.items(), DIVERGENCES.items()):
            case = f"{kind}, {rule}"
            losses[case], gradients[case] = errors(dtype, target, divergence, vocab, grid.device)
        name = f"{str(dtype).removeprefix('torch.')} logits, TP {grid.tp_size}"
        figures += [largest(f"loss, {name}", losses, LOSS_BOUND)]
        figures += [largest(f"gradient, {name}", gradients, gradient_bound)]
    return Outcome(tuple(figures))


def errors(
    dtype: torch.dtype, target: Target, divergence: Divergence, vocab: VocabShard, device: torch.device
) -> tuple[float, float]:
    """Return the largest error of a token's loss, and of an element of this rank's columns of the gradient."""
    student, teacher, tokens, weights = (x.to(device) for x in _rows(dtype))
    held = slice(vocab.start, vocab.start + vocab.num_valid)
    expected, expected_gradient = reference(student.double(), teacher.double(), target, divergence, weights)
    own = _shard(student, vocab).requires_grad_()
    stats = distillation_loss(  # backward over the logits themselves, as in training
        own.clone(),
        _shard(teacher, vocab),
        tokens,
        target=target,
        divergence=divergence,
        vocab=vocab,
        inplace_backward=True,
    )
    (stats.loss * weights).sum().backward()
    assert own.grad is not None
    error = ((stats.loss.double() - expected).abs() / (1 + expected)).max().item()
    gradient = own.grad.double()
    scale = expected_gradient.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    off = (gradient[:, : vocab.num_valid] - expected_gradient[:, held]).abs() / scale
    in_padding = gradient[:, vocab.num_valid :].abs()  # nothing may be there
    return error, torch.cat([off, in_padding], dim=1).max().item()


def reference(
    student: Tensor, teacher: Tensor, target: Target, divergence: Divergence, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each token's loss [T] and the gradient [T, V] of their weighted sum by the definition, in float64."""
    s = student.detach().clone().requires_grad_()
    with torch.no_grad():
        if target.rule == "teacher_alone":
            log_q = teacher.log_softmax(-1)
        else:
            mix = target.teacher_weight * teacher + student
            log_q = (_beta(student, mix, target)[:, None] * mix).log_softmax(-1)
    log_p = s.log_softmax(-1)
    if divergence.kind == "reverse_kl":
        loss = _kl(log_p, log_q)
    elif divergence.kind == "forward_kl":
        loss = _kl(log_q, log_p)
    else:
        share = divergence.jsd_lambda
        log_m = (share * log_q.exp() + (1 - share) * log_p.exp()).log()
        loss = share * _kl(log_q, log_m) + (1 - share) * _kl(log_p, log_m)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), s)
    return loss.detach(), gradient


def _beta(student: Tensor, mix: Tensor, target: Target) -> Tensor:
    """Return 1 / k [T] with H(softmax(beta mix)) = H(softmax(student)) and k <= k_max, by bisection on log beta."""

    def entropy(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    wanted = entropy(student)
    k = 1 + target.teacher_weight
    low = torch.full_like(wanted, 1 / (16 * k)).log()
    high = torch.full_like(wanted, 16 / k).log()
    for _ in range(80):
        middle = (low + high) / 2
        too_soft = entropy(middle.exp()[:, None] * mix) > wanted
        low, high = torch.where(too_soft, middle, low), torch.where(too_soft, high, middle)
    return low.exp() if target.k_max is None else low.exp().clamp(min=1 / k)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits of student and teacher on all valid columns, the response tokens and the weights.

    All ranks get the same values.  The distributions are sharp, flat, agreeing, disagreeing and equal.
    """
    generator = torch.Generator().manual_seed(11)
    shape = (NUM_ROWS, VOCAB_SIZE)
    student = torch.linspace(0.3, 4.0, NUM_ROWS)[:, None] * torch.randn(shape, generator=generator)
    teacher = student + torch.randn(shape, generator=generator)
    teacher[::3] = 3 * torch.randn(teacher[::3].shape, generator=generator)
    teacher[1] = student[1]
    tokens = torch.randint(VOCAB_SIZE, (NUM_ROWS,), generator=generator)
    weights = 0.5 + torch.rand(NUM_ROWS, generator=generator)
    return student.to(dtype), teacher.to(dtype), tokens, weights


def _shard(full: Tensor, vocab: VocabShard) -> Tensor:
    """Return this rank's columns; padding columns hold values that must not matter."""
    columns = full[:, vocab.start : vocab.start + vocab.num_valid]
    return torch.nn.functional.pad(columns, (0, vocab.size - vocab.num_valid), value=30.0).contiguous()
