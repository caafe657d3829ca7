# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which transfer is chosen for servers whose workers are on several hosts, and which is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_vllm import FakeVllm, fake_servers

from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.rollout.client import VllmServer
from megatron_selfdistill.rollout.transfer_choice import choose_transfer
from megatron_selfdistill.rollout.wire import boot_id

HERE = {"host": "here", "boot_id": boot_id(), "address": ""}
THERE = {"host": "node7", "boot_id": "another", "address": "10.0.0.7"}


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        yield servers


def choose(fakes: list[FakeVllm], name: str | None, folder: object, on_gpu: bool = False) -> str:
    return choose_transfer(name, [VllmServer(fake.address) for fake in fakes], folder=str(folder), on_gpu=on_gpu)


def test_without_a_name_it_is_nccl_on_gpus_else_files_where_all_workers_read_them(fakes, tmp_path):
    assert choose(fakes, None, tmp_path, on_gpu=True) == "nccl"
    assert choose(fakes, None, tmp_path) == "shared_memory"
    fakes[1].workers, fakes[1].blind = [HERE, THERE], ["node7"]
    assert choose(fakes, None, tmp_path) == "gloo"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shared_memory", "gloo", "nccl", "ipc"])
def test_a_named_transfer_that_reaches_all_workers_is_taken(fakes, name, tmp_path):
    assert choose(fakes, name, tmp_path, on_gpu=True) == name


def test_shared_memory_that_a_worker_of_another_host_does_not_see_is_refused(fakes, tmp_path):
    fakes[1].workers, fakes[1].blind = [HERE, THERE], ["node7"]
    with pytest.raises(ConfigError, match=f"{tmp_path} .* where worker 1 of {fakes[1].address}, on node7, cannot"):
        choose(fakes, "shared_memory", tmp_path)


def test_a_folder_that_hosts_share_serves_them(fakes, tmp_path):
    fakes[1].workers = [HERE, THERE]
    assert choose(fakes, "shared_memory", tmp_path) == "shared_memory"


def test_ipc_to_a_worker_of_another_host_is_refused(fakes, tmp_path):
    fakes[1].workers = [HERE, THERE]
    with pytest.raises(ConfigError, match=f"a worker of {fakes[1].address} runs on node7: set rollout.transfer=nccl"):
        choose(fakes, "ipc", tmp_path, on_gpu=True)


def test_a_folder_that_is_not_there_is_named(fakes, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.transfer_dir=.*/none cannot be written to"):
        choose(fakes, "shared_memory", tmp_path / "none")
