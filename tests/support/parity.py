# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Steps of a tiny model in many layouts, each to be compared with the same step on one rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import models
import pytest
from conditioning import bound
from layouts import Case, Joined, worst_difference
from models import parallel

from megatron_selfdistill.config import ParallelConfig, ScheduleConfig

TOLERANCE = bound("gqa")


# name -> (model, cuts, world size)
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "one rank": ("shallow", parallel(), 1),
    "TP2": ("shallow", parallel(tp=2), 2),
    "TP2 tied": ("tied", parallel(tp=2), 2),
    "TP2+SP": ("shallow", parallel(tp=2, sp=True), 2),
    "TP4 tied": ("tied", parallel(tp=4), 4),
    "PP2": ("shallow", parallel(pp=2), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP4": ("gqa", parallel(pp=4), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("shallow", parallel(tp=2, pp=2, sp=True), 4),
    "TP2xPP2+SP tied": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "DP2": ("shallow", parallel(), 2),
    "CP2": ("shallow", parallel(cp=2), 2),
    "CP2xPP2": ("shallow", parallel(cp=2, pp=2), 4),
    "CP2xTP2+SP": ("shallow", parallel(cp=2, tp=2, sp=True), 4),
    "CP2 experts": ("moe", parallel(cp=2), 2),
    "EP2": ("moe", parallel(ep=2), 2),
    "EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "TP2+SP experts": ("moe", parallel(tp=2, etp=1, sp=True), 2),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}


def case_of(name: str, **changes: Any) -> tuple[Case, int]:
    kind, cuts, world_size = LAYOUTS[name]
    return Case(kind=kind, parallel=cuts, **changes), world_size


def reference_of(case: Case) -> Case:
    """Return the same step on one rank, with other cuts into microbatches."""
    return dataclasses.replace(
        case,
        parallel=ParallelConfig(),
        pair_order="teacher_first",
        paired=False,
        mutation=None,
        schedule=ScheduleConfig(),
        extra_weightless=0,
    )


def compare(got: Joined, alone: Joined, tolerance: float = TOLERANCE) -> float:
    """Assert loss, norm and every gradient of ``got`` equal those of one rank; return the worst difference.

    ``tolerance``: a `conditioning.bound`.
    """
    assert alone[0].loss > 0.05, "the teacher must have something to say"
    worst, where = worst_difference(got[1], alone[1])
    assert worst <= tolerance, f"gradient of {where} differs by {worst:.1e}"
    assert got[0].loss == pytest.approx(alone[0].loss, rel=tolerance)
    assert got[0].grad_norm == pytest.approx(alone[0].grad_norm, rel=tolerance)
    return worst


def compare_parameters(got: Joined, alone: Joined) -> None:
    """Assert that every tensor has changed as much as on one rank.

    The tolerance is 1e-3 of the change, because only the last bits of a weight near 1 change.
    """
    moved, expected = (
        {key: value - models.full_weight(key, value.shape) for key, value in params.items()}
        for params in (got[2], alone[2])
    )
    assert all(change.norm() > 0 for change in expected.values()), "some parameter was never trained"
    worst, where = worst_difference(moved, expected)
    assert worst <= 1e-3, f"the change of {where} differs by {worst:.1e}"
