# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Steps of a tiny model in many layouts, each to be compared with the same step on one rank, within a bound.

Two layouts add the same products in different orders.  The result of each is that of weights which were rounded a few
times, so that the difference of the gradients is a few times the unit roundoff times the amplification of a change of
the weights, on every machine.  Without the amplification, no bound follows from the format alone: a gradient whose
terms cancel keeps few digits in any order of its terms.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from layouts import Case, Joined, Outcome, joined, run, worst_difference
from models import parallel
from ranks import RankPool

from megatron_selfdistill.config import ParallelConfig, ScheduleConfig

UNIT_ROUNDOFF = 2.0**-24
"""The largest relative error of one rounding to float32."""
ROUNDINGS = 3
"""The number of roundings of every weight that the orders of two layouts amount to."""
CHANGE = 2.0**-12
"""The relative change of every weight for a measurement: far above rounding, and small for a first-order change."""
AMPLIFICATION = {"gated_delta": 1000.0}
"""The relative change of a gradient per relative change of the weights, in the parameter where this is largest.

In the gated delta net this parameter is A_log: its gradient is a sum over all tokens, whose terms are 60 times as large
as the sum itself.
"""
OTHERWISE = 60.0
"""The amplification of all other tiny models of `models.model_config`."""


def bound(kind: str) -> float:
    """Return the largest relative difference of the gradients of two layouts of a model, in any parameter."""
    return ROUNDINGS * UNIT_ROUNDOFF * AMPLIFICATION.get(kind, OTHERWISE)


def amplification(ranks: RankPool, case: Case, seed: int) -> float:
    """Return the largest amplification of the gradients of ``case`` on one rank, of any parameter."""
    alone = dataclasses.replace(case, extra_weightless=0)
    _, exact, _ = joined(ranks.run(run, alone, world_size=1))
    _, changed, _ = joined(ranks.run(_run_with_changed_weights, alone, seed, world_size=1))
    return worst_difference(changed, exact)[0] / CHANGE


@contextlib.contextmanager
def changed_weights(seed: int) -> Iterator[None]:
    """Multiply every weight that this process fills by 1 + `CHANGE` or 1 - `CHANGE`, as the seed draws."""
    full_weight = models.full_weight

    def changed(key: str, *arguments: Any) -> torch.Tensor:
        weight = full_weight(key, *arguments)
        draw = torch.Generator().manual_seed(seed + sum(key.encode()))
        return weight * (1 + CHANGE * (2 * torch.randint(0, 2, weight.shape, generator=draw) - 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "full_weight", changed)
        yield


def _run_with_changed_weights(case: Case, seed: int) -> Outcome:
    with changed_weights(seed):
        return run(case)


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
    plainly = {"pair_order": "teacher_first", "paired": False, "mutation": None, "extra_weightless": 0}
    return dataclasses.replace(case, parallel=ParallelConfig(), schedule=ScheduleConfig(), **plainly)


def compare(got: Joined, alone: Joined, tolerance: float = TOLERANCE) -> float:
    """Assert loss, norm and every gradient of ``got`` equal those of one rank; return the worst difference."""
    assert alone[0].loss > 0.05, "the teacher must have something to say"
    worst, where = worst_difference(got[1], alone[1])
    assert worst <= tolerance, f"gradient of {where} differs by {worst:.1e}"
    assert got[0].loss == pytest.approx(alone[0].loss, rel=tolerance)
    assert got[0].grad_norm == pytest.approx(alone[0].grad_norm, rel=tolerance)
    return worst


def compare_parameters(got: Joined, alone: Joined) -> None:
    """Assert that every tensor has changed as much as on one rank, to 1e-3: only last bits of weights near 1 change."""
    moved, expected = (
        {key: value - models.full_weight(key, value.shape) for key, value in params.items()}
        for params in (got[2], alone[2])
    )
    assert all(change.norm() > 0 for change in expected.values()), "some parameter was never trained"
    worst, where = worst_difference(moved, expected)
    assert worst <= 1e-3, f"the change of {where} differs by {worst:.1e}"
