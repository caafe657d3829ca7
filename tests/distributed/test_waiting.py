# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Between its first and its last microbatch, a step neither reads from the device nor sends to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import layouts
import pytest
from host_traffic import host_traffic
from layouts import Case
from models import parallel
from tiers import combinations

from megatron_selfdistill.config import RecomputeConfig, ScheduleConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model import local_attention
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.pipeline import batch, schedule


def traffic_of(case: Case) -> list[str]:
    """Return the traffic that the second step of a case records on one rank, and the copies of its batch."""
    steps: list[list[str]] = []
    copies: list[int] = []
    get, copy = schedule.get_forward_backward_func, batch.to_device

    def copied(*args: Any) -> Any:
        copies.append(len(steps))
        return copy(*args)

    def watched() -> Callable[..., Any]:
        run = get()

        def call(**kwargs: Any) -> Any:
            if not steps:  # the first step makes what all steps keep
                steps.append([])
                return run(**kwargs)
            with host_traffic() as found:
                outcome = run(**kwargs)
            steps.append(found)
            return outcome

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "get_forward_backward_func", watched)
        patch.setattr(batch, "to_device", copied)
        layouts.run(dataclasses.replace(case, steps=2))
    _, found = steps
    return [*sorted(set(found)), f"{copies.count(1)} copies"]


def traffic_of_each(cases: dict[str, Case]) -> dict[str, list[str]]:
    return {name: traffic_of(case) for name, case in cases.items()}


RECOMPUTED = RecomputeConfig(granularity="full", method="uniform", num_layers=1)
CASES = {
    "one rank": {
        "plain": Case(kind="shallow"),
        "alternating": Case(kind="shallow", pair_order="alternating", paired=True),
        "fused": Case(kind="shallow", fusion=Fusion("keep_gradient", 16)),
        "full recompute": Case(kind="shallow", schedule=ScheduleConfig(recompute=RECOMPUTED)),
        "tied": Case(kind="tied"),
        "gated delta": Case(kind="gated_delta"),
        "anchored": Case(kind="shallow", target=Target(anchor="reference"), divergence="forward_kl"),
    },
    "TP2 with sequence parallelism": {
        "plain": Case(kind="shallow", parallel=parallel(tp=2, sp=True)),
        "fused": Case(kind="shallow", parallel=parallel(tp=2, sp=True), fusion=Fusion("low_memory", 16)),
    },
    "PP2": {"plain": Case(kind="shallow", parallel=parallel(pp=2))},
}


@combinations(layout=list(CASES), quick={"layout": ["TP2 with sequence parallelism"]}, strength=1)
def test_forward_and_backward_of_all_microbatches_exchange_nothing_with_the_host(ranks, layout):
    cases, world_size = CASES[layout], 1 if layout == "one rank" else 2
    for found in ranks.run(traffic_of_each, cases, world_size=world_size):
        assert found == {name: ["1 copies"] for name in cases}


def traffic_where_attention_asks_for_lengths() -> list[str]:
    of = local_attention.PackedSequences.of.__func__

    def without_bounds(cls: Any, *args: Any, with_segment_batches: bool) -> Any:
        return dataclasses.replace(of(cls, *args, with_segment_batches=False), segment_bounds=())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_attention.PackedSequences, "of", classmethod(without_bounds))
        return traffic_of(Case(kind="shallow"))


def test_what_a_layer_asks_the_device_would_be_seen(ranks):
    (found,) = ranks.run(traffic_where_attention_asks_for_lengths, world_size=1)
    assert any("local_attention.py" in line for line in found), found
