# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice of a transfer for servers whose workers are on several hosts, and its refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_vllm import FakeVllm, fake_servers

from megatron_selfdistill.engines.vllm import transfer
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.protocol import boot_id
from megatron_selfdistill.engines.vllm.transfer import choose_transfer
from megatron_selfdistill.errors import ConfigError

NCCL, GPU = "2.27.5", "GPU-11111111"
HERE = {"host": "here", "boot_id": boot_id(), "address": "", "nccl": NCCL, "gpu": "GPU-0"}
THERE = {"host": "node7", "boot_id": "another", "address": "10.0.0.7", "nccl": NCCL, "gpu": "GPU-7"}
OLDER = {**HERE, "nccl": "2.26.2"}


@pytest.fixture
def fakes(monkeypatch) -> Iterator[list[FakeVllm]]:
    """Start two servers of one worker each, which have the trainer's NCCL."""
    monkeypatch.setattr(transfer, "nccl_version", lambda: NCCL)
    monkeypatch.setattr(transfer, "own_gpu", lambda: GPU)
    with fake_servers(2) as servers:
        for number, server in enumerate(servers):
            server.workers = [{**HERE, "gpu": f"GPU-of-server-{number}"}]
        yield servers


def choose(fakes: list[FakeVllm], name: str | None, directory: object, on_gpu: bool = False) -> str:
    return choose_transfer(name, [VllmServer(fake.address) for fake in fakes], directory=str(directory), on_gpu=on_gpu)


def test_without_a_name_it_is_nccl_on_gpus_else_files_where_all_workers_read_them(fakes, tmp_path):
    assert choose(fakes, None, tmp_path, on_gpu=True) == "nccl"
    assert choose(fakes, None, tmp_path) == "shared_memory"
    fakes[1].workers, fakes[1].blind = [HERE, THERE], ["node7"]
    assert choose(fakes, None, tmp_path) == "gloo"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("workers", "blind", "chosen"),
    [
        ([HERE, {**THERE, "nccl": "2.27.3"}], [], "shared_memory"),
        ([HERE, {**THERE, "nccl": "2.27.3"}], ["node7"], "gloo"),
        ([{**OLDER, "nccl": None}], [], "shared_memory"),
        ([{**HERE, "gpu": GPU}], [], "shared_memory"),
        ([{**HERE, "gpu": "GPU-of-server-0"}], [], "shared_memory"),
    ],
    ids=["a shared directory", "two hosts", "a server on a CPU", "the trainer's GPU", "another worker's GPU"],
)
def test_where_nccl_cannot_join_all_it_is_the_best_other_way_and_the_log_says_why(
    fakes, tmp_path, caplog, workers, blind, chosen
):
    fakes[1].workers, fakes[1].blind = workers, blind
    assert choose(fakes, None, tmp_path, on_gpu=True) == chosen
    [record] = caplog.records
    theirs, gpu = workers[-1]["nccl"], workers[-1]["gpu"]
    of_gpus = f"the same GPU, {gpu}"
    assert all(word in record.message for word in ([of_gpus] if theirs == NCCL else [NCCL, theirs or "no NCCL"]))
    with pytest.raises(ConfigError, match=rf"rollout\.transfer=nccl cannot .*worker {len(workers) - 1} of"):
        choose(fakes, "nccl", tmp_path, on_gpu=True)
    assert {call for fake in fakes for call in fake.calls} <= {"/collective_rpc place", "/collective_rpc can_read"}


def test_shared_memory_that_a_worker_does_not_see_or_that_is_not_there_is_refused(fakes, tmp_path):
    fakes[1].workers, fakes[1].blind = [HERE, THERE], ["node7"]
    with pytest.raises(ConfigError, match=f"{tmp_path} .* where worker 1 of {fakes[1].address}, on node7, cannot"):
        choose(fakes, "shared_memory", tmp_path)
    with pytest.raises(ConfigError, match=r"rollout\.transfer_dir=.*/none"):
        choose(fakes, "shared_memory", tmp_path / "none")
