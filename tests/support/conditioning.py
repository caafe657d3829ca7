# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How much the gradients of a tiny model amplify a change of its weights, from which bounds of comparisons follow.

Two layouts add the same products in different orders.  The result of each is that of weights which were rounded a few
times, so that the difference of the gradients is a few times the unit roundoff times this amplification, on every
machine.  Without the amplification, no bound follows from the format alone: a gradient whose terms cancel keeps few
digits in any order of its terms.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from layouts import Case, Outcome, joined, run, worst_difference
from ranks import RankPool

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
    """Return the largest amplification of the gradients of ``case`` on one rank, of any parameter.

    Every weight of student and teacher is multiplied by 1 + `CHANGE` or 1 - `CHANGE`, as the seed draws.
    """
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
