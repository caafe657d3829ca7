# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The host learns how many sequences go on, on a GPU one pass late, and keeps the right ones."""

from __future__ import annotations

import pytest
import torch

from megatron_selfdistill.rollout.megatron.megatron_sampler import Survivors, lag_of

CPU = torch.device("cpu")
ENDS = torch.tensor([3, 1, 6, 2, 4, 1, 1, 6])
"""Passes after which each of 8 sequences ends."""


def decoded(lag: int) -> tuple[list[int], list[int], list[list[int]]]:
    """(known numbers, numbers of rows in each pass, sequences that each choice kept)."""
    survivors = Survivors(len(ENDS), CPU)
    survivors._lag = lag
    live, known, rows, kept_sequences = torch.arange(len(ENDS)), [], [], []
    for step in range(1, 20):
        rows.append(len(live))
        number, kept = survivors.after_pass(ENDS[live] > step)
        known.append(number)
        if number == 0:
            return known, rows, kept_sequences
        if kept is not None:
            live = live[kept]
            kept_sequences.append(live.tolist())
    raise AssertionError("it never ended")


def test_on_a_cpu_the_number_is_that_of_the_pass():
    assert decoded(0) == ([5, 4, 3, 2, 2, 0], [8, 8, 4, 4, 2, 2], [[0, 2, 4, 7], [2, 7]])


def test_one_pass_late_the_same_sequences_survive_and_one_pass_is_more():
    known, rows, kept = decoded(1)
    assert known == [8, 5, 4, 3, 2, 2, 0]
    assert rows == [8, 8, 8, 4, 4, 2, 2]
    assert kept == [[0, 2, 4, 7], [2, 7]]


@pytest.mark.parametrize(("device", "lag"), [("cpu", 0), ("cuda", 1)])
def test_the_device_decides_how_late(device, lag):
    assert lag_of(torch.device(device)) == lag
