# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The buckets of an update on several ranks: how often the ranks agree, what an error does, how much memory lives."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from fake_server_sampler import tell
from fake_vllm import FakeVllm, fake_servers
from torch import Tensor

from megatron_selfdistill.engines.vllm import weight_update
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.protocol import layout_of
from megatron_selfdistill.engines.vllm.transfer import Bucket, SharedMemoryTransfer
from megatron_selfdistill.engines.vllm.weight_update import AGREEMENT_BUCKETS, WeightUpdate, send_buckets
from megatron_selfdistill.errors import ConfigError, EngineError

BUCKETS = 2 * AGREEMENT_BUCKETS + 5
NUMBERS = 64  # of a bucket


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_servers(1) as [server]:
        yield server


class Exported:
    """A stream of `BUCKETS` buckets as `Exporter.stream` yields them, each with one collective over all ranks."""

    def __init__(self, count: int = BUCKETS) -> None:
        self.count = count
        self.numbers: list[int] = []  # the numbers of the buckets that this rank has exported

    def stream(self, first: int) -> Iterator[list[tuple[str, Tensor]]]:
        for number in range(first, self.count):
            self.numbers.append(number)
            full = torch.full((NUMBERS,), float(number) if dist.get_rank() == 0 else 0.0)
            dist.all_reduce(full)
            tensors = [(f"layer.{number}", full)] if dist.get_rank() == 0 else []
            del full
            yield tensors
            tensors.clear()


def begun(address: str, directory: str, fault: str = "") -> WeightUpdate | None:
    """Return rank 0's update, whose fifth bucket meets the fault "no room"."""
    if dist.get_rank() != 0:
        return None
    transfer = SharedMemoryTransfer(directory)
    pack, packed = transfer.pack, itertools.count(1)

    def pack_or_fail(tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        if next(packed) == 5 and fault == "no room":
            raise ConfigError("no room for a bucket")
        return pack(tensors)

    transfer.pack = pack_or_fail  # type: ignore[method-assign]
    return WeightUpdate(transfer, [VllmServer(address, timeout_s=3600)], 3)


def all_sent(
    address: str, directory: str, fault: str = "", patience_s: float = 3600.0, count: int = BUCKETS
) -> dict[str, Any]:
    """Send an update; return this rank's error, its exported buckets, and the number of broadcasts of objects."""
    exported, update = Exported(count), begun(address, directory, fault)
    broadcasts, error = 0, ""
    broadcast, run_long = dist.broadcast_object_list, weight_update.run_long_on_rank_0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal broadcasts
        broadcasts += 1
        broadcast(*arguments, **options)

    def waiting(*arguments: Any) -> None:
        if fault == "silence" and dist.get_rank() == 1:
            tell(address, hangs_at="")
        run_long(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", counted)
        patch.setattr(weight_update, "run_long_on_rank_0", waiting)
        try:
            send_buckets(exported.stream, update, patience_s)
        except (ConfigError, EngineError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    if update is not None:
        update.finish()
        update._transfer.close()
    dist.barrier()  # no rank is behind in another collective
    return {"error": error, "numbers": exported.numbers, "broadcasts": broadcasts}


def whole(fake: FakeVllm, count: int = BUCKETS) -> bool:
    return [(name, float(tensor.mean())) for name, tensor in fake.weights.items()] == [
        (f"layer.{number}", float(number)) for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, AGREEMENT_BUCKETS, BUCKETS])
def test_the_ranks_agree_once_per_sixteen_buckets_and_at_the_end(ranks, fake, tmp_path, count):
    arguments = (fake.address, str(tmp_path), "", 3600.0, count)
    for rank in ranks.run(all_sent, *arguments, world_size=2):
        assert rank["error"] == "" and rank["numbers"] == list(range(count))
        assert rank["broadcasts"] == count // AGREEMENT_BUCKETS + 1
    assert whole(fake, count) and fake.version == "3"


def test_an_error_of_rank_0_is_raised_on_all_ranks_at_the_next_agreement(ranks, fake, tmp_path):
    first, second = ranks.run(all_sent, fake.address, str(tmp_path), "no room", world_size=2)
    assert first["error"] == second["error"] == "ConfigError: no room for a bucket"
    assert first["numbers"] == second["numbers"] == list(range(AGREEMENT_BUCKETS))


def test_when_no_server_is_left_the_export_ends_at_the_next_agreement(ranks, fake, tmp_path):
    fake.fail_at = "/update_weights"
    for rank in ranks.run(all_sent, fake.address, str(tmp_path), world_size=2):
        assert rank["error"] == "" and rank["numbers"] == list(range(AGREEMENT_BUCKETS))
    assert fake.version == "loading"


def test_a_silent_server_keeps_no_other_rank_in_a_collective_and_later_gets_each_bucket_once(ranks, fake, tmp_path):
    """The server answers once rank 1 waits outside of the export, where a rank may wait for any time."""
    count, fake.hangs_at = 5, "/update_weights"
    loaded: list[str] = []
    load = fake.update

    def noted(info: dict[str, Any]) -> None:
        loaded.extend(info.get("names", []))
        load(info)

    fake.update = noted  # type: ignore[method-assign]
    arguments = (fake.address, str(tmp_path), "silence", 0.3, count)
    first, second = ranks.run(all_sent, *arguments, world_size=2)
    assert first["error"] == second["error"] == "" and first["numbers"] == second["numbers"]
    assert first["numbers"][: count + 2] == [*range(count), 1, 2]
    assert loaded == [f"layer.{number}" for number in range(count)]
    assert whole(fake, count) and fake.version == "3"


class NewMemory:
    """A transfer into new memory for each bucket, whose servers load a bucket until the next one is packed."""

    isolated = True

    def __init__(self) -> None:
        self.packed: list[weakref.ref[Tensor]] = []
        self.most_alive = 0  # the largest number of packed buckets that were alive at a time
        self.num_sent = 0

    def join(self, servers: Any) -> dict[Any, Exception]:
        return {}

    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
        copy = torch.cat([tensor.view(torch.uint8) for _, tensor in tensors])
        self.packed.append(weakref.ref(copy))
        self.most_alive = max(self.most_alive, num_alive(self.packed))
        return Bucket(layout_of(tensors), copy)

    def send(self, bucket: Bucket, servers: Any) -> dict[Any, Exception]:
        self.num_sent += 1
        while len(self.packed) <= self.num_sent < BUCKETS:
            time.sleep(0.001)
        return {}


def num_alive(tensors: Sequence[weakref.ref[Tensor]]) -> int:
    return sum(tensor() is not None for tensor in tensors)


def most_alive(address: str) -> tuple[int, int]:
    """Return the largest numbers of full and of packed buckets that were alive at a time."""
    transfer: Any = NewMemory()
    update = WeightUpdate(transfer, [VllmServer(address, timeout_s=3600)], 3)
    full: list[weakref.ref[Tensor]] = []
    most_full = 0

    def watched(first: int) -> Iterator[list[tuple[str, Tensor]]]:
        nonlocal most_full
        for tensors in Exported().stream(first):
            full.extend(weakref.ref(tensor) for _, tensor in tensors)
            most_full = max(most_full, num_alive(full))
            yield tensors

    send_buckets(watched, update, 3600.0)
    update.settle()
    assert len(full) == len(transfer.packed) == transfer.num_sent == BUCKETS
    return most_full, transfer.most_alive


def test_one_full_bucket_and_two_packed_buckets_are_alive_at_a_time(ranks, fake):
    assert ranks.run(most_alive, fake.address, world_size=1) == [(1, 2)]


def test_on_a_gpu_a_bucket_leaves_when_it_is_packed_and_waits_for_no_later_work(monkeypatch, fake, tmp_path):
    """Torch's events and streams have stand-ins that record the order of the calls."""
    calls = Mock(**{"is_available.return_value": True, "current_device.return_value": 5, "Stream.return_value": "own"})
    for name in ("is_available", "current_device", "set_device", "Stream", "set_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    transfer: Any = NewMemory()
    calls.pack.side_effect, calls.send.return_value = transfer.pack, {}
    transfer.pack, transfer.send = calls.pack, calls.send
    update = WeightUpdate(transfer, [VllmServer(fake.address, timeout_s=3600)], 3)
    update.send([("a", torch.ones(4))])
    update.settle()
    calls.set_device.assert_called_once_with(5)
    calls.set_stream.assert_called_once_with("own")
    order = [name for name, *_ in calls.mock_calls]
    places = [order.index(name) for name in ("pack", "Event().record", "Event().synchronize", "send")]
    assert places == sorted(places) and order.index("set_stream") < places[2]
