# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""GPU memory does not fall into pieces: few lengths of packed rows, and segments that grow."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import load
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import length_quantum, required_seq_length
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import expand_segments
from megatron_selfdistill.pipeline import batch
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere

SIZES = {"max_tokens": 4096, "cp_size": 1, "tp_size": 1, "paired": False}


def lengths(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the memory that steps of other contexts need and get on a device."""
    grid: Any = SimpleNamespace(device=torch.device(device), cp_size=1, tp_size=1, dp_group=None)
    monkeypatch.setattr(batch, "max_over_ranks", lambda values, group: list(values))
    monkeypatch.setattr(batch, "microbatch_multiple", lambda grid: 1)
    found = []
    for step in range(40):
        contexts = [ContextPair("p", [1] * (300 + 37 * step), [1] * 400, [2] * 100, truncated=False)]
        packed = pack_everywhere(contexts, Packing(SIZES["max_tokens"], "teacher_first", with_teacher=True), grid)
        found.append((required_seq_length(contexts, PackingRules(**SIZES)), packed.seq_length))
    return found


def test_steps_on_a_gpu_have_few_lengths_and_on_a_cpu_none_longer_than_needed(monkeypatch):
    assert all(length == need for need, length in lengths("cpu", monkeypatch))
    found = lengths("cuda", monkeypatch)
    assert len({need for need, _ in found}) > 30 and len({length for _, length in found}) <= 8
    quantum = length_quantum(SIZES["max_tokens"])
    assert all(length % quantum == 0 and 0 <= length - need < quantum for need, length in found)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        *((version, "PYTORCH_CUDA_ALLOC_CONF") for version in ("2.6.0+cu124", "2.8.1")),
        *((version, "PYTORCH_ALLOC_CONF") for version in ("2.9.0", "2.13.0+cpu", "3.0")),
    ],
)
def test_segments_grow_by_the_name_that_torch_reads(version, name):
    environment: dict[str, str] = {}
    expand_segments(environment, version)
    assert environment == {name: "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}


@pytest.mark.parametrize("name", ranks.ALLOCATOR_VARIABLES)
@pytest.mark.parametrize("version", ["2.6.0", "2.13.0"])
def test_what_the_user_set_stays(name, version):
    of_user = {name: "max_split_size_mb:512", "NCCL_GRAPH_REGISTER": "1"}
    expand_segments(environment := dict(of_user), version)
    assert environment == of_user


@pytest.mark.parametrize(("on_cpu", "grows"), [(True, False), (False, True)])
def test_segments_are_set_before_anything_touches_a_gpu(monkeypatch, on_cpu, grows):
    """And left alone on a CPU."""
    for name in ranks.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "cpu", SimpleNamespace(ON_CPU=on_cpu))
    seen: list[bool] = []

    def first(config: Any) -> None:
        seen.append("expandable_segments:True" in [os.environ.get(name) for name in ranks.ALLOCATOR_VARIABLES])
        raise InterruptedError

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks, "_init_process_group", first)
    monkeypatch.setattr(ranks.os, "environ", dict(os.environ))  # a copy, which keeps what is set below
    with pytest.raises(InterruptedError):
        ranks.initialize(load([]).parallel, 1)
    assert seen == [grows]
