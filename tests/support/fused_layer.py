# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A small output layer for the tests of the fused loss, its float64 reference, and the layer without fusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from logit_pairs import DIVERGENCES as DIVERGENCES
from logit_pairs import by_bisection, divergence
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss

WIDTH, VOCAB_SIZE, PADDED_VOCAB_SIZE = 12, 370, 512  # over 4 ranks: 128, 128, 114 and 0 valid columns
NUM_TOKENS, CHUNK = 13, 5
TARGETS = {
    "capped": Target(anchor="student"),
    "fixed": Target("fixed", k=1.3, anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
}


class Example:
    """Hidden states, weights, tokens and the weights of their losses, equal on every rank."""

    def __init__(self, tied: bool, dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.student, self.teacher = normal(num_tokens, WIDTH), normal(num_tokens, WIDTH)
        self.weight = normal(PADDED_VOCAB_SIZE, WIDTH)
        self.teacher_weight = None if tied else normal(PADDED_VOCAB_SIZE, WIDTH)
        self.tokens = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator)
        self.row_weights = torch.randn(num_tokens, generator=generator)  # of either sign, none alike
        self.row_weights[::4] = 0

    def to(self, device: torch.device) -> Example:
        """Move all tensors to ``device``; return the same example."""
        for name, value in vars(self).items():
            setattr(self, name, value if value is None else value.to(device))
        return self


def reference(example: Example, target: Target, kind: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, dH and dW (valid rows) in float64, by autograd through the definition, with beta by bisection."""
    hidden, weight = (x.double().requires_grad_() for x in (example.student, example.weight[:VOCAB_SIZE]))
    of_teacher = example.weight if example.teacher_weight is None else example.teacher_weight
    s, t = hidden @ weight.T, example.teacher.double() @ of_teacher[:VOCAB_SIZE].double().T
    log_q, _ = by_bisection(s.detach(), t.detach(), target)
    losses = divergence(s.log_softmax(-1), log_q, kind)
    (losses * example.row_weights).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def shard_of(group: dist.ProcessGroup | None) -> tuple[VocabShard, slice]:
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    return vocab, slice(vocab.start, vocab.start + vocab.size)


def fused(
    example: Example, target: Target, kind: Divergence, mode: str, chunk_tokens=CHUNK, group=None, **options: Any
) -> tuple[TokenStats, Tensor | None, Tensor | None]:
    """Return (statistics, dH, dW of this rank's rows)."""
    vocab, mine = shard_of(group)
    hidden, weight = options.pop("hidden", example.student).clone(), example.weight[mine].clone()
    of_teacher = None if example.teacher_weight is None else example.teacher_weight[mine]
    teacher_hidden = options.pop("teacher_hidden", example.teacher)
    tensors = hidden.requires_grad_(), teacher_hidden, weight.requires_grad_(), of_teacher, example.tokens
    options |= {"target": target, "divergence": kind, "vocab": vocab, "chunk_tokens": chunk_tokens, "mode": mode}
    stats = fused_distillation_loss(*tensors, **options)
    (stats.loss * example.row_weights).sum().backward()
    return stats.detached(), hidden.grad, weight.grad


def materialised(example: Example, target: Target, kind: Divergence) -> tuple[TokenStats, Tensor | None, Tensor | None]:
    """Return (statistics, dH, dW) of the loss of logits in full."""
    hidden, weight = example.student.clone().requires_grad_(), example.weight.clone().requires_grad_()
    of_teacher = weight.detach() if example.teacher_weight is None else example.teacher_weight
    s, t, options = hidden @ weight.T, example.teacher @ of_teacher.T, {"target": target, "divergence": kind}
    stats = distillation_loss(s, t, example.tokens, vocab=shard_of(None)[0], **options)
    (stats.loss * example.row_weights).sum().backward()
    return stats.detached(), hidden.grad, weight.grad


def relative(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.double() - expected.double()).norm() / expected.double().norm())


every_mode = pytest.mark.parametrize("mode", FUSED_MODES)
every_tying = pytest.mark.parametrize("tied", [True, False], ids=["same weight", "own weight"])


def call(example: Example, hidden: Tensor, weight: Tensor, *, mode: str, **options: Any) -> TokenStats:
    """Return the statistics of the fused layer; ``options`` replace its arguments."""
    own = {"target": Target(anchor="student"), "divergence": Divergence(), "vocab": shard_of(None)[0]}
    arguments = {**own, "chunk_tokens": CHUNK, "mode": mode, **options}
    tensors = hidden, example.teacher, weight, example.teacher_weight, example.tokens
    return fused_distillation_loss(*tensors, **arguments)
