# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss in one call: values and gradients equal a float64 reference of the definition, for whole batches."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from logit_pairs import divergence
from tiers import combinations
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.loss import (
    Divergence,
    Target,
    linear_self_distillation_loss,
    mixed_target,
    self_distillation_loss,
)

B, S, V = 3, 5, 13
DIVERGENCES = ["reverse_kl", "forward_kl", Divergence("jsd", 0.3)]
TARGETS = {
    "default": Target(),
    "student": Target(anchor="student"),
    "teacher alone": Target("teacher_alone", anchor="student"),
    "geometric": Target("fixed", k=None, anchor="reference", teacher_weight=2.0),
    "unbounded": Target(k_max=None, teacher_weight=0.4),
}


def divergence_of(log_p: Tensor, log_q: Tensor, kind: Any) -> Tensor:
    return divergence(log_p, log_q, Divergence(kind) if isinstance(kind, str) else kind)


def by_definition(logits: list[Tensor], chosen: Tensor, target: Target, kind: Any) -> Tensor:
    """Return the losses [b, s], 0 where ``chosen`` is not set, with a gradient to the student's logits."""
    student, teacher, reference = logits
    log_q = mixed_target(student.detach(), teacher, target, reference if target.is_anchored else None).log_q
    return torch.where(chosen, divergence_of(student.log_softmax(-1), log_q, kind), 0.0)


def nasty_logits(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return logits of student, teacher and reference: ties, a fork, equal rows, a sure row and huge numbers."""
    generator = torch.Generator().manual_seed(3)
    logits = [2 * torch.randn(B, S, V, generator=generator, dtype=torch.float64) for _ in range(3)]
    for one in logits:
        one[0, 0] = 0.0
        one[0, 1, :2] = 6.0
        one[1, 2] += 300.0
    logits[1][1, 0] = logits[0][1, 0]
    logits[1][2, 3, 4] = 30.0
    return [one.to(dtype) for one in logits]


def labels() -> Tensor:
    """Return labels of which two positions are ignored, one of them with NaN in its logits."""
    found = torch.arange(B * S).view(B, S) % V
    found[0, 3] = found[2, 4] = -100
    return found


@combinations(strength=1, name=list(TARGETS), divergence=DIVERGENCES)
def test_values_and_gradients_are_those_of_the_definition(name, divergence):
    target, chosen = TARGETS[name], labels() != -100
    student, teacher, reference = nasty_logits()
    wanted_of = student.clone().requires_grad_()
    wanted = by_definition([wanted_of, teacher, reference], chosen, target, divergence)
    teacher[0, 3] = math.nan  # ignored
    weights = torch.linspace(0.5, 2, B * S, dtype=torch.float64).view(B, S)
    (wanted * weights).sum().backward()
    given = student.clone().requires_grad_()
    others = (teacher, reference if target.is_anchored else None)
    found = self_distillation_loss(given, *others, labels(), target=target, divergence=divergence, reduction="none")
    (found * weights).sum().backward()
    assert torch.allclose(found.double(), wanted.detach(), rtol=1e-6, atol=2e-5)
    assert torch.allclose(given.grad, wanted_of.grad, rtol=1e-4, atol=5e-5)
    assert not given.grad[0, 3].any() and not given.grad[2, 4].any()


WIDTH = 6
LOOK_ALIKE = Target("fixed", teacher_weight=2.0)
"""A target whose q = softmax((w t + r) / (1 + w)) needs no solver, neither in the loss nor in the definition."""
OPTIONS: dict[str, list[Any]] = {
    "target": [LOOK_ALIKE, Target("fixed", teacher_weight=0.5)],
    "divergence": DIVERGENCES,
    "reduction": ["mean", "sum", "none"],
    "num_items_in_batch": [None, 7, torch.tensor(7)],
    "vocab_size": [None, V - 2],
    "labels_or_mask": [None, labels(), labels() != -100],
    "check_nan": [True, False],
    "chunk_tokens": [1, numpy.int64(4), 100],
    "mode": ["low_memory", "keep_gradient"],
}
"""Argument -> values; `process_group`, and the weights of teacher and reference, have tests of their own."""
CASES = [
    (function, name, value)
    for function in (self_distillation_loss, linear_self_distillation_loss)
    for name, values in OPTIONS.items()
    for value in values
    if name in inspect.signature(function).parameters
]


def reduced(losses: Tensor, chosen: Tensor, reduction: str = "mean", num_items_in_batch: Any = None) -> Tensor:
    losses = torch.where(chosen, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else (num_items_in_batch or chosen.sum()))


@pytest.mark.parametrize(("function", "name", "value"), CASES, ids=lambda it: getattr(it, "__name__", str(it)[:20]))
def test_every_argument_of_both_functions_has_the_value_and_gradient_of_the_definition(function, name, value):
    generator = torch.Generator().manual_seed(6)
    hidden = [torch.randn(B, S, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = [torch.randn(V, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    options = {"target": LOOK_ALIKE, name: value}
    labels_or_mask, target = options.get("labels_or_mask"), options["target"]
    chosen = torch.ones(B, S, dtype=torch.bool) if labels_or_mask is None else labels() != -100
    student, teacher, reference = (h @ w.t() for h, w in zip(hidden, weights, strict=True))
    log_p, t, r = (one[..., : options.get("vocab_size")].log_softmax(-1) for one in (student, teacher, reference))
    log_q = ((target.teacher_weight * t + r) / (1 + target.teacher_weight)).log_softmax(-1).detach()
    losses = divergence_of(log_p, log_q, options.get("divergence", "reverse_kl"))
    wanted = reduced(
        losses, chosen, **{key: options[key] for key in ("reduction", "num_items_in_batch") & options.keys()}
    )
    if function is self_distillation_loss:
        found = function(student, teacher.detach(), reference.detach(), **options)
    else:
        pairs = (hidden[1], weights[1].detach(), hidden[2], weights[2].detach())
        found = function(hidden[0], weights[0], *pairs, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(one.sum(), weights[0], retain_graph=True)[0] for one in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_the_defaults_are_those_of_the_configuration():
    configured = Config()
    loss = Divergence.configured(configured.loss, configured.method)
    assert Divergence() == loss and Target() == Target.configured(configured.target)
    student, teacher, reference = nasty_logits(torch.float32)
    named = {"target": Target.configured(configured.target), "divergence": loss}
    default = self_distillation_loss(student, teacher, reference).item()
    assert self_distillation_loss(student, teacher, reference, **named).item() == pytest.approx(default, rel=1e-6)
    for options in ({}, named):
        linear = linear_self_distillation_loss(student, torch.eye(V), teacher, None, reference, **options)
        assert linear.item() == pytest.approx(default, rel=1e-5)
    found = mixed_target(student, teacher, reference_logits=reference).log_q
    torch.testing.assert_close(found, mixed_target(student, teacher, named["target"], reference).log_q)


def spoilt(logits: Tensor, value: float) -> Tensor:
    logits = logits.clone()
    logits[1, 2, 4] = logits[2, 0, 7] = value
    return logits


LOGITS = nasty_logits(torch.float32)


def test_nan_may_be_the_loss_of_its_position_alone():
    student, teacher, reference = LOGITS
    given = student.clone().requires_grad_()
    others = spoilt(teacher, math.nan), reference
    each = self_distillation_loss(given, *others, reduction="none", check_nan=False)
    bad = torch.zeros(B, S, dtype=torch.bool)
    bad[1, 2] = bad[2, 0] = True
    assert torch.equal(each.isnan(), bad)
    each[~bad].sum().backward()
    assert given.grad[~bad].isfinite().all() and given.grad[~bad].any()
    assert not self_distillation_loss(given, *others, ~bad).isnan()
    states, weight = torch.ones(B, S, V), torch.eye(V)
    assert linear_self_distillation_loss(states, weight, others[0], None, reference, check_nan=False).isnan()


def test_a_transform_is_refused_and_the_gradient_is_a_constant():
    student, teacher, reference = LOGITS
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda own: self_distillation_loss(own, teacher, reference))(student)
    given = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(self_distillation_loss(given, teacher, reference), given, create_graph=True)
    assert gradient.any() and not gradient.requires_grad


@pytest.mark.full  # the import of the compiler takes seconds
@pytest.mark.parametrize("rows", ["all", "labels"])
def test_inside_of_a_compiled_function_the_loss_runs_uncompiled_with_the_same_gradient(rows):
    student, teacher, reference = LOGITS
    chosen = labels() if rows == "labels" else None

    def step(own: Tensor) -> Tensor:
        return 2 * self_distillation_loss(torch.tanh(own), teacher, reference, chosen)

    results = []
    for function in (step, torch.compile(step, backend="eager")):
        given = student.clone().requires_grad_()
        function(given).backward()
        results.append(given.grad)
    assert results[0].any() and torch.allclose(*results, rtol=1e-5, atol=1e-7)


def of_a_dtensor() -> tuple[float, Tensor]:
    """Return the loss and the gradient of logits that a DTensor divides among the ranks by columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    logits = [torch.nn.functional.pad(one, (0, 1)) for one in nasty_logits()]
    student, teacher, reference = (distribute_tensor(one, mesh, [Shard(-1)]) for one in logits)
    student.requires_grad_()
    with pytest.raises(ValueError, match=r"student_logits must be .*; got a DTensor: pass its to_local"):
        self_distillation_loss(student, teacher, reference)
    local = [one.to_local() for one in (student, teacher, reference)]
    loss = self_distillation_loss(*local, labels(), vocab_size=V, process_group=mesh.get_group("tp"))
    loss.backward()
    return loss.item(), student.grad.full_tensor()


def test_the_local_parts_of_a_dtensor_have_the_loss_and_gradient_of_the_whole(ranks):
    student, teacher, reference = nasty_logits()
    student.requires_grad_()
    loss = self_distillation_loss(student, teacher, reference, labels())
    loss.backward()
    for value, gradient in ranks.run(of_a_dtensor, world_size=2):
        assert value == pytest.approx(loss.item(), rel=1e-6)
        assert torch.allclose(gradient[..., :V], student.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_works_under_autocast_checkpointing_and_accumulation(dtype):
    torch.manual_seed(5)
    layer = torch.nn.Linear(6, V)
    inputs, teacher, reference = torch.randn(B, S, 6), torch.randn(B, S, V), torch.randn(B, S, V)

    def loss_of(rows: slice, count: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = torch.utils.checkpoint.checkpoint(layer, inputs[rows], use_reentrant=False)
        return self_distillation_loss(
            logits.to(dtype), teacher[rows].to(dtype), reference[rows].to(dtype), num_items_in_batch=count
        )

    loss_of(slice(None), B * S).backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    for row in range(B):
        loss_of(slice(row, row + 1), B * S).backward()
    assert whole.abs().max() > 0 and torch.allclose(layer.weight.grad, whole, rtol=2e-2, atol=1e-3)
