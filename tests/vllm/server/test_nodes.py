# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A real vLLM server of two nodes, here two commands on one host: half of the model lies in each."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
from ports import neighbouring_ports
from real_servers import assert_session_ends, sampler
from responses import tokens
from trained import GREEDY, MAX_LENGTH, MODEL, Reach, greedy_by_transformers, requests, write_config

from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Response

START_SECONDS, TIMEOUT = 900.0, 600.0
REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Server:
    """The commands of two nodes, that of the head first."""

    commands: list[subprocess.Popen[bytes]]
    logs: list[Path]
    reach: Reach

    def wait_until_healthy(self) -> None:
        client = VllmServer(self.reach.addresses[0], self.reach.token)
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(EngineError):
                return run(client.health(5.0))
            ended = [one for one in self.commands if one.poll() is not None]
            assert not ended and time.monotonic() < deadline, self.tails()
            time.sleep(0.5)

    def tails(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self.logs)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("nodes")
    hf_config, token = write_config(directory / "model"), secrets.token_urlsafe(16)
    port, master_port = neighbouring_ports(), neighbouring_ports()
    package = directory / "package"
    package.mkdir()
    (package / "megatron_selfdistill").symlink_to(REPOSITORY / "megatron_selfdistill", target_is_directory=True)
    command = [
        *(os.environ["SELFDISTILL_VLLM_PYTHON"], "-m", "megatron_selfdistill.engines.vllm.server.serve"),
        *(f"--hf-config={hf_config}", f"--port={port}", "--tensor-parallel-size=2", "--dtype=float32"),
        *(f"--max-model-len={MAX_LENGTH}", "--kv-cache-gb=0.1", "--nnodes=2", "--master-addr=127.0.0.1"),
        f"--master-port={master_port}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(package), TOKEN_VARIABLE: token}
    logs = [directory / f"{rank}.log" for rank in range(2)]
    commands = []
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
            commands.append(
                subprocess.Popen([*command, f"--node-rank={rank}"], env=environment, cwd=directory, **options)
            )
    try:
        server = Server(commands, logs, Reach([f"http://127.0.0.1:{port}"], token, hf_config))
        server.wait_until_healthy()
        yield server
    finally:
        for one in commands:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def synced(reach: Reach, transfer: str) -> list[Response]:
    """Return greedy responses of the server with the weights of seed 1, in TP 2."""
    chunks, grid = models.build(MODEL, models.parallel(tp=2), seed=1)
    with sampler(chunks, grid, reach, transfer=transfer, bucket_mb=0.06) as built:
        built.update_weights(1)
        return built.generate(requests(12), GREEDY)


@pytest.mark.parametrize("transfer", ["gloo", None])
def test_workers_on_all_nodes_have_the_weights(ranks, server, transfer):
    prompts = [request.prompt for request in requests(12)]
    wanted = ranks.run(greedy_by_transformers, prompts, GREEDY.max_new_tokens, 1, world_size=1, timeout=TIMEOUT)[0]
    per_rank = ranks.run(synced, server.reach, transfer, world_size=2, timeout=TIMEOUT)
    for responses in per_rank:
        assert tokens(responses) == [token_ids for token_ids, _ in wanted]


def test_with_a_worker_node_the_whole_server_ends(server):
    os.kill(server.commands[1].pid, signal.SIGKILL)
    for one in server.commands:
        one.wait()
        assert_session_ends(one.pid)
    assert "node rank 1 of this server has ended, and this node ends with it" in server.logs[0].read_text()
