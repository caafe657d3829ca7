# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The fused loss with a product of teachers, side by side as one wide teacher, against its definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss import mixed_target
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Target

NUM_TOKENS, NUM_VALID, NUM_ROWS, WIDTH, W = 8, 11, 12, 8, 2.0


def rows() -> dict[str, Tensor]:
    """Return the logits [R, V] of student, reference and three teachers, with ties and forks, and shares [R, 3]."""
    generator = torch.Generator().manual_seed(3)
    student, reference, a, b, c = 2 * torch.randn(5, NUM_TOKENS, NUM_VALID, generator=generator, dtype=torch.float64)
    a[0, 2], b[0, 5] = 30.0, 30.0  # a fork: two sure teachers of different tokens
    c[0] = 0.0
    a[1], b[1], c[1] = a[1], a[1], a[1]  # one distribution
    a[2], b[2], c[2] = 0.0, 0.0, 0.0  # all tokens tie
    a[3, :4] = b[3, :4] = 7.0  # four tokens tie in two teachers
    a[4, 1] = -1e4  # a token that one teacher excludes
    reference[5, :2] = 9.0  # the anchor is torn between two tokens
    student[6] = reference[6]
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1 / 3] * 3, [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    shares = torch.cat([shares, shares[1:4]]).double()
    return {"student": student, "reference": reference, "a": a, "b": b, "c": c, "shares": shares}


def definition(given: dict[str, Tensor], anchored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(p || q) [R], its gradient for the student's logits, and k [R], from the distributions themselves."""
    log_p = given["student"].log_softmax(1)
    teachers = torch.stack([given[name].log_softmax(1) for name in "abc"])
    log_t = (given["shares"].t()[:, :, None] * teachers).sum(0).log_softmax(1)
    target = Target(teacher_weight=W, anchor="reference" if anchored else "student")
    found = mixed_target(given["student"], log_t, target, given["reference"] if anchored else None)
    surprise = log_p - found.log_q
    losses = (log_p.exp() * surprise).sum(1)
    return losses, log_p.exp() * (surprise - losses[:, None]), 1 / found.beta


def padded(logits: Tensor) -> Tensor:
    """Return the output weight [V, h] whose logits are ``logits`` for the unit vectors as states, with padding."""
    return torch.nn.functional.pad(logits, (0, NUM_ROWS - NUM_VALID), value=math.nan).nan_to_num(5.0).t().contiguous()


def computed(mode: str, chunk_tokens: int, anchored: bool) -> dict[str, Any]:
    size, rank = dist.get_world_size(), dist.get_rank()
    given, group = rows(), dist.group.WORLD if size > 1 else None
    own_rows = slice(rank * NUM_ROWS // size, (rank + 1) * NUM_ROWS // size)
    states = torch.eye(NUM_TOKENS, WIDTH, dtype=torch.float64)
    weights = {name: padded(given[name])[own_rows] for name in ("student", "reference", "a", "b", "c")}
    joined = torch.stack([weights[name].unflatten(1, (size, -1)) for name in "abc"], 2).flatten(1)
    slices = [given["shares"][:, i, None] * states.chunk(size, 1)[rank] for i in range(3)]
    hidden, weight = states.clone().requires_grad_(), weights["student"].clone().requires_grad_()
    log_r = given["reference"].log_softmax(1)
    stats = fused_distillation_loss(
        hidden,
        torch.cat(slices, 1),
        weight,
        joined,
        torch.arange(NUM_TOKENS) % NUM_VALID,
        target=Target(teacher_weight=W, anchor="reference" if anchored else "student"),
        divergence=Divergence(),
        vocab=VocabShard.from_group(NUM_ROWS, NUM_VALID, group),
        reference=(states.chunk(size, 1)[rank].contiguous(), weights["reference"]) if anchored else None,
        reference_entropy=-(log_r.exp() * log_r).sum(1) if anchored else None,
        chunk_tokens=chunk_tokens,
        mode=mode,
    )
    stats.loss.sum().backward()  # type: ignore[no-untyped-call]
    return {"loss": stats.loss.detach(), "k": 1 / stats.beta, "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize(("mode", "chunk_tokens"), [("keep_gradient", 3), ("low_memory", 5)])
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_product_of_teachers_has_the_values_and_gradients_of_its_definition(
    ranks, world_size, mode, chunk_tokens, anchored
):
    losses, gradients, k = definition(rows(), anchored)
    assert bool((k < 1 + W).any()) and bool((k == 1 + W).any())
    found = ranks.run(computed, mode, chunk_tokens, anchored, world_size=world_size)
    whole = padded(rows()["student"])
    expected_weight = torch.nn.functional.pad(gradients, (0, NUM_ROWS - NUM_VALID)).t()
    for rank, got in enumerate(found):
        torch.testing.assert_close(got["loss"], losses, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got["k"], k, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["hidden"], gradients @ whole[:NUM_VALID], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["weight"], expected_weight.chunk(world_size)[rank], rtol=1e-6, atol=1e-7)
