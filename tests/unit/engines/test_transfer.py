# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights on their way to servers: every bit arrives, or the server that lacks one is named."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fake_vllm import FakeVllm
from forks import in_a_fork
from torch import Tensor

from megatron_selfdistill.engines.vllm import transfer as transfer_module
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.protocol import digest
from megatron_selfdistill.engines.vllm.transfer import BroadcastTransfer, SharedMemoryTransfer, Transfer
from megatron_selfdistill.engines.vllm.weight_update import WeightUpdate
from megatron_selfdistill.errors import ConfigError

PATIENCE_S = 3600.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]


def tensors(count: int = 11) -> list[tuple[str, Tensor]]:
    """Return tensors of odd sizes, so that the next tensor is not aligned for its type; one is a strided view."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        wide = torch.randint(100, (3 + i, 5), generator=generator).to(DTYPES[i % len(DTYPES)])
        found.append((f"layer.{i}.weight", wide.t() if i == 3 else wide[:, :3] if i == 4 else wide))
    return found


def buckets(size: int = 4) -> Iterator[list[tuple[str, Tensor]]]:
    everything = tensors()
    for first in range(0, len(everything), size):
        yield everything[first : first + size]


def same(arrived: dict[str, Tensor], sent: list[tuple[str, Tensor]]) -> bool:
    return list(arrived) == [name for name, _ in sent] and all(
        arrived[name].dtype == tensor.dtype
        and arrived[name].shape == tensor.shape
        and bytes(arrived[name].contiguous().view(torch.uint8).flatten().tolist())
        == bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        for name, tensor in sent
    )


@pytest.fixture(params=["shared_memory", "gloo"])
def transfer(request, tmp_path) -> Iterator[Transfer]:
    made = SharedMemoryTransfer(tmp_path) if request.param == "shared_memory" else BroadcastTransfer("gloo", PATIENCE_S)
    yield made
    made.close()


def reach(fakes: list[FakeVllm]) -> list[VllmServer]:
    return [VllmServer(fake.address, timeout_s=PATIENCE_S) for fake in fakes]


def sent(transfer: Transfer, servers: list[VllmServer], version: int) -> WeightUpdate:
    update = WeightUpdate(transfer, servers, version)
    for bucket in buckets():
        update.send(bucket)
    update.finish()
    return update


def test_a_digest_knows_a_missing_and_a_doubled_name_but_no_order():
    assert digest(["a", "b", "c"]) == digest(["c", "a", "b"])
    assert len({digest(names) for names in (["a", "b"], ["a"], ["a", "b", "b"], ["ab"], [])}) == 5


def test_every_server_gets_every_tensor_to_the_last_bit(transfer, fakes):
    servers = reach(fakes)
    for version in (3, 4):
        update = sent(transfer, servers, version)
        assert not update.failures and update.servers == servers
        assert update.num_bytes == sum(tensor.nbytes for _, tensor in tensors())
        for fake in fakes:
            assert same(fake.weights, tensors())
            assert fake.version == str(version)
            assert fake.calls[-4:] == ["/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    joins = [fake.calls.count("/init_weight_transfer_engine") for fake in fakes]
    assert joins == [1, 1]  # not anew for each update


def test_a_server_answers_nothing_and_has_no_version_while_weights_arrive(transfer, fakes):
    update = WeightUpdate(transfer, reach(fakes), 5)
    first, second, *_ = buckets()
    update.send(first)
    update.send(second)  # returns when the first one is loaded
    assert {fake.version for fake in fakes} == {"loading"}
    update.settle()
    transfer.close()
    calls = [call for call in fakes[0].calls if not call.startswith(("/get_world", "/init_weight"))]
    calls = [call for call in calls if call != "/collective_rpc place"]
    begun = ["/pause", "/update_weight_version", "/collective_rpc abandon_weight_update"]
    assert calls == [*begun, "/start_weight_update", "/update_weights", "/update_weights"]


def test_on_this_host_two_files_serve_all_updates_and_none_stays(fakes, tmp_path):
    transfer = SharedMemoryTransfer(tmp_path)
    seen: list[set[Path]] = []
    for version in (1, 2, 3):  # within two updates both files are as large as the largest bucket
        assert not sent(transfer, reach(fakes), version).failures
        seen.append(set(tmp_path.iterdir()))
    assert len(seen[1]) == 2 and seen[1] == seen[2]
    transfer.close()
    assert list(tmp_path.iterdir()) == []


def test_workers_of_other_hosts_read_a_file_of_the_owner_per_bucket_and_none_stays(fakes, tmp_path):
    fakes[0].workers = [{**fakes[0].workers[0], "boot_id": "another"}]
    seen: list[list[int]] = []
    received = fakes[0].update
    noted = lambda: seen.append([path.stat().st_mode & 0o777 for path in tmp_path.iterdir()])  # noqa: E731
    fakes[0].update = lambda info: (noted(), received(info))  # type: ignore[method-assign]
    assert not sent(SharedMemoryTransfer(tmp_path), reach(fakes), 1).failures
    assert seen == [[0o600]] * 3 + [[]]  # the last is the announcement
    assert same(fakes[0].weights, tensors()) and same(fakes[1].weights, tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_packed_while_the_one_before_is_loaded(fakes, tmp_path, monkeypatch):
    """The second one, before the server has answered for the first; the third, not before."""
    answering, done = threading.Event(), []
    loaded, transfer = fakes[0].update, SharedMemoryTransfer(tmp_path)
    pack_one, settle = transfer.pack, WeightUpdate.settle

    def packing(bucket: Any) -> Any:
        done.append("packed")
        return pack_one(bucket)

    def settling(self: Any, *deadline: float) -> bool:
        if self._on_its_way is not None and not answering.is_set():
            done.append("waits")
            answering.set()
        return settle(self, *deadline)

    def loading(info: Any) -> None:
        answering.wait()
        done.append("loaded")
        loaded(info)

    fakes[0].update = loading  # type: ignore[method-assign]
    monkeypatch.setattr(transfer, "pack", packing)
    monkeypatch.setattr(WeightUpdate, "settle", settling)
    assert not sent(transfer, reach(fakes[:1]), 1).failures
    assert done[:4] == ["packed", "packed", "waits", "loaded"]
    assert same(fakes[0].weights, tensors()) and fakes[0].version == "1"


def test_a_directory_without_room_is_refused_before_it_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_module.os, "posix_fallocate", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(ConfigError, match=rf"rollout\.transfer_dir={tmp_path} .*rollout\.bucket_mb"):
        SharedMemoryTransfer(tmp_path).pack(tensors())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_trainer_left_is_removed_by_the_next_and_what_is_in_use_is_not(tmp_path):
    def killed() -> None:
        with transfer_module.bucket_file(tmp_path, torch.ones(5, dtype=torch.uint8)):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed)[0] == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    used, other = tmp_path / left.name.replace("-", "-other"), tmp_path / "model.bucket"
    used.touch()
    other.touch()
    with used.open("rb") as bucket:
        fcntl.flock(bucket, fcntl.LOCK_EX)
        SharedMemoryTransfer(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([used, other])


def test_workers_on_other_hosts_are_told_an_address_that_leads_out_of_this_one(fakes, monkeypatch):
    """The head is on this machine and reached by 127.0.0.1, but not all of its server's nodes are."""
    out = {"127.0.0.1": "127.0.0.1", "node7": "localhost"}
    monkeypatch.setattr(transfer_module, "own_address", lambda host, port: out[host])
    fakes[0].workers = [{**fakes[0].workers[0], "address": address} for address in ("127.0.0.1", "node7")]
    hosts = []
    fakes[0].take_part = lambda info: (hosts.append(info["arguments"]["host"]), FakeVllm.take_part(fakes[0], info))
    broadcast = BroadcastTransfer("gloo", PATIENCE_S)
    assert not broadcast.join(reach(fakes[:1]))
    broadcast.close()
    assert hosts == ["localhost"]


def test_a_server_that_was_started_anew_joins_again(transfer, fakes):
    servers = reach(fakes)
    for version in (1, 2):
        assert not sent(transfer, servers, version).failures
        fakes[0].restart()
        transfer.forget(servers[0])
    assert fakes[1].calls.count("/init_weight_transfer_engine") == (1 if transfer.isolated else 2)
