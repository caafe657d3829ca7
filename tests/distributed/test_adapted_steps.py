# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step with adapters has the gradients of the merged model, by the chain rule, in every layout."""

from __future__ import annotations

import dataclasses

import adapted
import pytest
import torch
from adapted import ADAPTER, AdaptedCase
from layouts import Case, Outcomes, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, ScheduleConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import Fusion

TARGET = Target(anchor="reference")
SHALLOW = Case(kind="shallow", target=TARGET)
LAYOUTS = {
    "tp2 sp": ("shallow", 2, parallel(tp=2, sp=True)),
    "tp2": ("shallow", 2, parallel(tp=2)),
    "pp2": ("shallow", 2, parallel(pp=2)),
    "pp2 vpp2": ("gqa", 2, parallel(pp=2, vpp=2)),
    "cp2": ("shallow", 2, parallel(cp=2)),
    "dp2": ("shallow", 2, parallel()),
    "tp4 sp tied": ("tied", 4, parallel(tp=4, sp=True)),
    "tp2 pp2 sp tied": ("tied", 4, parallel(tp=2, pp=2, sp=True)),
    "tp2 cp2 sp": ("shallow", 4, parallel(tp=2, cp=2, sp=True)),
}


@pytest.fixture(scope="module")
def outcomes(ranks):
    return Outcomes(ranks, adapted.run_each)


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


def expected(outcomes: Outcomes, job: AdaptedCase) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the gradients of the factors by the chain rule, from the merged model on one rank."""
    plain = AdaptedCase(alone(job.case), job.adapter)
    merged, (_, _, params) = outcomes.of([dataclasses.replace(plain, merged=True), plain])
    return merged[0].loss, chained(merged[1], params, job.adapter.scale)


def alone(case: Case) -> Case:
    """Return the same step on one rank, in the plainest way."""
    plainly = {"pair_order": "teacher_first", "paired": False, "fusion": None, "schedule": ScheduleConfig()}
    return dataclasses.replace(case, parallel=parallel(), **plainly)


def check(outcomes: Outcomes, job: AdaptedCase, world_size: int) -> None:
    loss, wanted = expected(outcomes, job)
    outcome, grads, _ = outcomes(job, world_size)
    assert outcome.loss == pytest.approx(loss, rel=2e-5)
    got = of_adapters(grads)
    assert got.keys() == wanted.keys() and len(got) > 0
    assert all(gradient.norm() > 0 for gradient in got.values())
    difference, name = worst_difference(got, wanted)
    assert difference < 1e-4, f"{name}: {difference}"
    others = [key for key, gradient in grads.items() if key not in got and gradient.any()]
    assert not others, f"frozen weights have gradients: {others}"


@pytest.mark.full
def test_alternating_microbatches_have_the_gradients_of_the_merged_model(outcomes):
    check(outcomes, AdaptedCase(dataclasses.replace(SHALLOW, pair_order="alternating", paired=True)), 1)


@combinations(name=list(LAYOUTS), quick={"name": ["tp2 sp"]}, strength=1)
def test_every_layout_has_the_same_gradients(outcomes, name):
    kind, world_size, layout = LAYOUTS[name]
    check(outcomes, AdaptedCase(Case(kind=kind, target=TARGET, parallel=layout)), world_size)


@pytest.mark.full
@pytest.mark.parametrize("anchor", ["student", 0.25])
def test_controls_beside_adapters_have_the_gradients_of_the_merged_model(outcomes, anchor):
    target = Target(anchor=anchor, num_controls=2)
    check(outcomes, AdaptedCase(dataclasses.replace(SHALLOW, target=target, parallel=parallel(tp=2, sp=True))), 2)


@pytest.mark.full
@pytest.mark.parametrize("target", [Target(anchor="student"), TARGET])
@pytest.mark.parametrize("mode", ["low_memory", "keep_gradient"])
def test_a_fused_output_layer_needs_no_gradient_of_its_own(outcomes, mode, target):
    check(outcomes, AdaptedCase(Case(kind="shallow", target=target, fusion=Fusion(mode, 5))), 1)


@pytest.mark.parametrize("granularity", ["full", pytest.param("selective", marks=pytest.mark.full)])
def test_recomputed_layers_keep_their_adapters(outcomes, granularity):
    check(outcomes, AdaptedCase(dataclasses.replace(SHALLOW, schedule=adapted.recomputing(granularity))), 1)


@pytest.mark.full
def test_a_mixture_of_experts_has_adapters_in_its_attention(outcomes):
    layout = parallel(ep=2)
    job = AdaptedCase(Case(kind="moe", target=TARGET, parallel=layout, model_changes={"transformer": {}}))
    check(outcomes, job, 2)


@pytest.mark.full
def test_some_layers_and_the_stabilised_scale(outcomes):
    some = AdapterConfig(rank=4, alpha=0.2, rank_stabilised=True, layers=["linear_proj", "linear_fc2"])
    assert some.scale == pytest.approx(0.1) and ADAPTER.scale == pytest.approx(0.1)
    check(outcomes, AdaptedCase(SHALLOW, some), 1)


@pytest.mark.parametrize("distributed", [pytest.param(False, marks=pytest.mark.full), True])
def test_steps_change_the_factors_alone_and_every_layout_alike(outcomes, distributed):
    settings = {"optimizer": "adam", "precision": "fp32", "lr": 0.01, "lr_warmup_steps": 0, "weight_decay": 0.1}
    optimizer = OptimizerConfig(**settings, use_distributed_optimizer=distributed)
    job = AdaptedCase(dataclasses.replace(SHALLOW, optimizer=optimizer, steps=2))
    _, _, before = outcomes(AdaptedCase(SHALLOW))
    _, _, after = outcomes(adapted.with_layout(job, parallel=parallel(tp=2, sp=True)), 2)
    _, _, alone = outcomes(job)
    for key, value in before.items():
        assert torch.equal(after[key], value) == ("_adapter." not in key), key
    assert worst_difference(of_adapters(after), of_adapters(alone))[0] < 1e-3
