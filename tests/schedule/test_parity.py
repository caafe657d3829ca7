# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distillation gradient does not depend on how the model and the batch are cut."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import layouts
import pytest
from layouts import Case, join, worst_difference

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig

TOLERANCE = 1e-5


def parallel(tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, ep: int = 1, etp: int | None = None):
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def with_sp(config: ParallelConfig) -> ParallelConfig:
    return dataclasses.replace(config, sequence_parallel=True)


# name -> (model, cuts, world size)
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "TP2": ("gqa", parallel(tp=2), 2),
    "TP2 tied": ("tied", parallel(tp=2), 2),
    "TP2+SP": ("gqa", with_sp(parallel(tp=2)), 2),
    "TP4 tied": ("tied", parallel(tp=4), 4),
    "PP2": ("gqa", parallel(pp=2), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP4": ("gqa", parallel(pp=4), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("gqa", with_sp(parallel(tp=2, pp=2)), 4),
    "TP2xPP2+SP tied": ("tied", with_sp(parallel(tp=2, pp=2)), 4),
    "DP2": ("gqa", parallel(), 2),
    "CP2": ("gqa", parallel(cp=2), 2),
    "CP2xPP2": ("gqa", parallel(cp=2, pp=2), 4),
    "CP2xTP2+SP": ("gqa", with_sp(parallel(cp=2, tp=2)), 4),
    "EP2": ("moe", parallel(ep=2), 2),
    "EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "EP2xTP2+SP": ("moe", with_sp(parallel(ep=2, tp=2, etp=1)), 2),
}
GQA = layouts.models._GQA


@pytest.fixture(scope="module")
def outcomes(ranks):
    """Runs a case once per module and joins its ranks."""

    @cache
    def joined(key: str) -> tuple[Any, dict, dict]:
        case, world_size = pending[key]
        per_rank = ranks.run(layouts.run, case, world_size=world_size)
        losses = {outcome.loss for outcome in per_rank}
        assert len(losses) == 1, f"ranks disagree about the loss: {losses}"
        return per_rank[0], join([o.grads for o in per_rank]), join([o.params for o in per_rank])

    pending: dict[str, tuple[Case, int]] = {}

    def run(case: Case, world_size: int = 1):
        pending[repr((case, world_size))] = case, world_size
        return joined(repr((case, world_size)))

    return run


def compare(outcomes, case: Case, world_size: int, tolerance: float = TOLERANCE, reference: Case | None = None) -> float:
    """Assert loss, norm and every gradient of ``case`` equal those of one rank; return the worst relative difference."""
    reference = reference or dataclasses.replace(
        case,
        parallel=ParallelConfig(),
        pair_order="teacher_first",
        paired=False,
        mutation=None,
        schedule=ScheduleConfig(),
        extra_weightless=0,
    )
    alone, expected, _ = outcomes(reference)
    assert alone.loss > 0.05, "the teacher must have something to say"
    got, grads, _ = outcomes(case, world_size)
    worst, where = worst_difference(grads, expected)
    assert worst <= tolerance, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=tolerance)
    assert got.grad_norm == pytest.approx(alone.grad_norm, rel=tolerance)
    return worst


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_those_of_one_rank(outcomes, name, divergence, record_property):
    kind, cuts, world_size = LAYOUTS[name]
    worst = compare(outcomes, Case(kind=kind, parallel=cuts, divergence=divergence), world_size)
    record_property("worst relative difference", worst)
