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

from megatron_selfdistill.config import ScheduleConfig
from megatron_selfdistill.model import packed_sequences
from megatron_selfdistill.model.output_layer import Fusion
from megatron_selfdistill.pipeline import device_batch, schedule


def traffic_of(case: Case) -> list[str]:
    """Return the traffic that one rank's call of the schedule records, and the number of copies of the batch."""
    traffic: set[str] = set()
    copies = []
    get, copy = schedule.get_forward_backward_func, device_batch.to_device_in_one_copy

    def watched() -> Callable[..., Any]:
        run = get()

        def call(**kwargs: Any) -> Any:
            with host_traffic() as found:
                outcome = run(**kwargs)
            traffic.update(found)
            return outcome

        return call

    layouts.run(case)  # what is made once and kept is there now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "get_forward_backward_func", watched)
        patch.setattr(device_batch, "to_device_in_one_copy", lambda *a: copies.append(1) or copy(*a))
        layouts.run(case)
    return [*sorted(traffic), f"{len(copies)} copies"]


CASES = {
    "plain": (Case(), 1),
    "alternating": (Case(pair_order="alternating", paired=True), 1),
    "fused": (Case(fusion=Fusion("keep_gradient", 16)), 1),
    "full recompute": (
        Case(schedule=ScheduleConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
        1,
    ),
    "TP2 with sequence parallelism": (Case(parallel=parallel(tp=2, sp=True)), 2),
    "TP2 with sequence parallelism, fused": (
        Case(parallel=parallel(tp=2, sp=True), fusion=Fusion("low_memory", 16)),
        2,
    ),
    "PP2": (Case(parallel=parallel(pp=2)), 2),
    "tied": (Case(kind="tied"), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_of_all_microbatches_exchange_nothing_with_the_host(ranks, name):
    case, world_size = CASES[name]
    for found in ranks.run(traffic_of, case, world_size=world_size):
        pass
        assert found == ["1 copies"]


def traffic_with(fault: str) -> list[str]:
    """Return the traffic that is recorded with a fault that the code had before."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "Megatron's rotary embedding":
            megatrons = packed_sequences._megatrons_rotary_embedding
            patch.setattr(packed_sequences.rope_utils, "_apply_rotary_pos_emb_thd", megatrons)
        elif fault == "attention asks for lengths":
            of = packed_sequences.PackedSequences.of.__func__

            def without_bounds(cls: Any, *args: Any, with_segment_batches: bool) -> Any:
                return dataclasses.replace(of(cls, *args, with_segment_batches=False), segment_bounds=())

            patch.setattr(packed_sequences.PackedSequences, "of", classmethod(without_bounds))
        return traffic_of(Case())


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("Megatron's rotary embedding", "rope_utils.py"),
        ("attention asks for lengths", "layers.py"),
    ],
)
def test_what_a_layer_asks_the_device_would_be_seen(ranks, fault, where):
    (found,) = ranks.run(traffic_with, fault, world_size=1)
    assert any(where in line for line in found), found
