# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Memory that servers read: how much of it there is, and that all of it is given back."""

from __future__ import annotations

import base64
import itertools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import fake_servers
from torch import Tensor

from megatron_selfdistill.engines.vllm import transfer_buckets
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.transfer import IpcTransfer
from megatron_selfdistill.engines.vllm.transfer_buckets import PrivateMemory, TwoBuffers, without_expandable_segments
from megatron_selfdistill.engines.vllm.weight_update import WeightUpdate


class IpcStandIn:
    """A stand-in for torch's shared GPU memory, with torch's rule for freeing it.

    Memory that was shared is freed once no object of this process holds it and its counter, which starts at 1 and has
    no sign, is 0.
    """

    def __init__(self) -> None:
        self.handed_out: list[weakref.ref[Tensor]] = []
        self.counters: list[int] = []

    def allocate(self, num_bytes: int) -> Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.handed_out.append(weakref.ref(memory))
        return memory

    def share(self, storage: Any) -> tuple[Any, ...]:
        self.counters.append(1)
        number = len(self.counters) - 1
        return 0, f"handle {number}".encode(), storage.nbytes(), 0, b"counters", number, b"event", True

    def release(self, handle: bytes, offset: int, device: torch.device) -> None:
        assert handle == b"counters"
        self.counters[offset] -= 1

    @property
    def num_allocated(self) -> int:
        pairs = zip(self.handed_out, self.counters, strict=True)
        return sum(memory() is not None or counter != 0 for memory, counter in pairs)


@pytest.fixture
def ipc(monkeypatch) -> Iterator[IpcStandIn]:
    stand_in = IpcStandIn()
    monkeypatch.setattr(transfer_buckets, "_gpu_memory", stand_in.allocate)
    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda storage: stand_in.share(storage))
    monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter", stand_in.release)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield stand_in


@pytest.mark.parametrize("fault", ["", "/update_weights"], ids=["read", "not opened"])
def test_two_buffers_serve_an_update_and_none_stays_though_no_server_opened_it(ipc, monkeypatch, fault):
    tensors = [[(f"layer.{number}", torch.full((100,), number))] for number in range(5)]
    read: list[dict[str, Any]] = []
    with fake_servers(1) as [fake]:
        fake.fail_at = fault
        fake.take_part = lambda info: None  # type: ignore[method-assign]
        fake.update = read.append  # type: ignore[method-assign]
        transfer = IpcTransfer()
        for version in (1, 2):
            update = WeightUpdate(transfer, [VllmServer(fake.address)], version)
            for bucket in tensors:
                update.send(bucket)
            assert 1 <= ipc.num_allocated <= 2
            update.finish()
            assert ipc.num_allocated == 0
            assert bool(update.failures) == bool(fault)
    if not fault:
        handles = [base64.b64decode(info["where"]["handle"]) for info in read if "where" in info]
        assert handles == [f"handle {number}".encode() for number in (0, 1, 0, 1, 0, 2, 3, 2, 3, 2)]


def test_buffers_take_turns_and_grow_when_they_must():
    made = []

    def make(num_bytes: int) -> PrivateMemory:
        made.append(num_bytes)
        return PrivateMemory(num_bytes)

    buffers = TwoBuffers(make)
    taken = [buffers.next(num_bytes) for num_bytes in (10, 10, 8, 10, 20, 5, 20)]
    assert made == [10, 10, 20]
    assert all(one is not other for one, other in itertools.pairwise(taken))
    assert all(
        buffer.memory.numel() >= wanted for buffer, wanted in zip(taken, (10, 10, 8, 10, 20, 5, 20), strict=True)
    )


@pytest.fixture
def settings() -> Iterator[None]:
    """Keep torch's real settings of the allocator, and restore them afterwards."""
    before = transfer_buckets._allocator_settings()
    yield
    transfer_buckets._set_allocator_settings(before)


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("expandable_segments:True,max_split_size_mb:512", "expandable_segments:False,max_split_size_mb:512"),
        ("max_split_size_mb:512,expandable_segments: True", "max_split_size_mb:512,expandable_segments:False"),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_memory_for_ipc_is_no_expandable_segment_and_other_settings_stay(settings, before, inside):
    transfer_buckets._set_allocator_settings(before)
    with pytest.raises(MemoryError), without_expandable_segments():
        assert transfer_buckets._allocator_settings() == inside
        raise MemoryError
    assert transfer_buckets._allocator_settings() == before
