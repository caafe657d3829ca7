# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step with adapters has the gradients of the merged model, by the chain rule, in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from adapted import ADAPTER
from layouts import Case, worst_difference
from models import parallel
from parity import LAYOUTS
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import Fusion

TARGET = Target(anchor="reference")
STUDENT = Target(anchor="student")
ADAPTED = Case(kind="shallow", target=TARGET, adapter=ADAPTER)
TP2 = parallel(tp=2, sp=True)


def case(world_size: int = 1, **changes: Any) -> tuple[Case, int]:
    return dataclasses.replace(ADAPTED, **changes), world_size


def recomputing(**how: Any) -> ScheduleConfig:
    return ScheduleConfig(recompute=RecomputeConfig(**how))


CASES = {
    **{name: case(world_size, kind=kind, parallel=cuts) for name, (kind, cuts, world_size) in LAYOUTS.items()},
    "alternating": case(pair_order="alternating", paired=True),
    "controls beside the student": case(2, target=Target(anchor="student", num_controls=2), parallel=TP2),
    "controls beside a share": case(2, target=Target(anchor=0.25, num_controls=2), parallel=TP2),
    "low memory": case(target=STUDENT, fusion=Fusion("low_memory", 5)),
    "low memory, reference": case(fusion=Fusion("low_memory", 5)),
    "kept gradient": case(target=STUDENT, fusion=Fusion("keep_gradient", 5)),
    "kept gradient, reference": case(fusion=Fusion("keep_gradient", 5)),
    "full recompute": case(schedule=recomputing(granularity="full", method="uniform", num_layers=1)),
    "selective recompute": case(schedule=recomputing(granularity="selective")),
    "some layers, the stabilised scale": case(
        adapter=AdapterConfig(rank=4, alpha=0.2, rank_stabilised=True, layers=["linear_proj", "linear_fc2"])
    ),
}


def chained(weight_grads: dict[str, torch.Tensor], params: dict[str, torch.Tensor], scale: float) -> dict:
    """Return the gradients of the factors that the gradients of the merged weights give, in float64."""
    grads = {}
    for key in (key for key in params if key.endswith("_adapter.a")):
        layer = key.removesuffix("_adapter.a")
        gradient = weight_grads[f"{layer}.weight"].double()
        a, b = params[key].double(), params[f"{layer}_adapter.b"].double()
        grads[key] = scale * b.mT @ gradient
        grads[f"{layer}_adapter.b"] = scale * gradient @ a.mT
    return grads


def of_adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if "_adapter." in key}


@combinations(name=list(CASES), quick={"name": ["TP2+SP", "full recompute"]}, strength=1)
def test_a_step_has_the_gradients_of_the_merged_model(outcomes, name):
    """The merged model takes the same step on one rank, in the plainest way."""
    case, world_size = CASES[name]
    plainly = {"pair_order": "teacher_first", "paired": False, "fusion": None, "schedule": ScheduleConfig()}
    plain = dataclasses.replace(case, parallel=parallel(), **plainly)
    merged, (_, _, params) = outcomes.of([dataclasses.replace(plain, merges_adapter=True), plain])
    wanted = chained(merged[1], params, case.adapter.scale)
    outcome, grads, _ = outcomes(case, world_size)
    assert outcome.loss == pytest.approx(merged[0].loss, rel=2e-5)
    got = of_adapters(grads)
    assert got.keys() == wanted.keys() and len(got) > 0
    assert all(gradient.norm() > 0 for gradient in got.values())
    difference, where = worst_difference(got, wanted)
    assert difference < 1e-4, f"{where}: {difference}"
    others = [key for key, gradient in grads.items() if key not in got and gradient.any()]
    assert not others, f"frozen weights have gradients: {others}"


@pytest.mark.parametrize("distributed", [pytest.param(False, marks=pytest.mark.full), True])
def test_steps_change_the_factors_alone_and_every_layout_alike(outcomes, distributed):
    settings = {"optimizer": "adam", "precision": "fp32", "lr": 0.01, "lr_warmup_steps": 0, "weight_decay": 0.1}
    optimizer = OptimizerConfig(**settings, use_distributed_optimizer=distributed)
    stepped = dataclasses.replace(ADAPTED, optimizer=optimizer, steps=2)
    _, _, before = outcomes(ADAPTED)
    _, _, after = outcomes(dataclasses.replace(stepped, parallel=TP2), 2)
    _, _, alone = outcomes(stepped)
    for key, value in before.items():
        assert torch.equal(after[key], value) == ("_adapter." not in key), key
    assert worst_difference(of_adapters(after), of_adapters(alone))[0] < 1e-3
