# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Real vLLM servers, for a trainer whose environment has no vLLM: ``make test-vllm`` runs these."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from trained import MAX_LENGTH, Reach, write_config

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.rollout.vllm.client import VllmServer
from megatron_selfdistill.rollout.vllm.server.server_process import ServerProcess, start_servers, wait_until_healthy

START_SECONDS = 900.0


@dataclass(frozen=True)
class Servers:
    """Two servers with one token, for guided requests too."""

    processes: list[ServerProcess]
    reach: Reach


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("servers")
    hf_config = write_config(directory / "model")
    token = secrets.token_urlsafe(16)
    processes = start_servers(
        RolloutConfig(
            engine="vllm",
            placement="server",
            num_servers=2,
            server_python=os.environ["SELFDISTILL_VLLM_PYTHON"],
            kv_cache_gb=0.2,
            guidance="mixed",
            engine_args={"max_num_seqs": 32},
        ),
        directory=directory,
        hf_config=hf_config,
        token=token,
        dtype=torch.float32,
        max_model_len=MAX_LENGTH,
    )
    try:
        clients = [VllmServer(one.address, token) for one in processes]
        wait_until_healthy(processes, clients, START_SECONDS)
        yield Servers(processes, Reach([one.address for one in processes], token, hf_config))
    finally:
        for one in processes:
            one.stop()
