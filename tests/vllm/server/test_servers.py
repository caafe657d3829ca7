# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ServerSampler` with real vLLM servers, from a trainer that has no vLLM."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import patch

import models
import pytest
from real_servers import Across, across_an_update, assert_new_weights_go_on, assert_session_ends, processes_of, sampler
from responses import own, tokens
from trained import DRAWN, FAMILY, GREEDY, MODEL, Reach, greedy_by_transformers, requests

from megatron_selfdistill.engines.vllm import server_batch
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Response, SamplingParams

HERE = Path(__file__).resolve().parent
TIMEOUT = 600.0


def synced(
    servers: Reach, layout: dict[str, int], transfer: str
) -> tuple[list[list[Response]], dict[str, float], bool]:
    """Greedy responses with the weights of seed 0, then of seed 1; what was measured; whether vLLM is here."""
    chunks, grid = models.build(MODEL, models.parallel(**layout))
    everything = requests(12)
    with sampler(chunks, grid, servers, transfer=transfer, bucket_mb=0.06) as built:
        written = []
        for seed in (0, 1):
            models.fill_from_names(chunks, seed)
            built.update_weights(seed)
            written.append(built.generate(own(grid, everything), GREEDY))
        return written, built.metrics(), importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def expected(ranks) -> dict[int, list[tuple[list[int], list[float]]]]:
    """Return, by seed, greedy tokens and log-probs of transformers for `requests(12)`."""
    prompts = [request.prompt for request in requests(12)]
    return {
        seed: ranks.run(greedy_by_transformers, prompts, GREEDY.max_new_tokens, seed, world_size=1, timeout=TIMEOUT)[0]
        for seed in (0, 1)
    }


@pytest.mark.parametrize(
    ("layout", "world_size", "transfer"),
    [({"tp": 2, "pp": 2}, 4, "shared_memory"), ({"tp": 2, "pp": 2}, 4, "gloo"), ({}, 2, "gloo")],
    ids=["TP2xPP2, shared memory", "TP2xPP2, gloo", "DP2, gloo"],
)
def test_after_a_sync_greedy_tokens_are_those_of_transformers_with_the_same_weights(
    ranks, servers, expected, layout, world_size, transfer
):
    per_rank = ranks.run(synced, servers.reach, layout, transfer, world_size=world_size, timeout=TIMEOUT)
    num_replicas = 1 if layout else world_size
    assert not any(has_vllm for _, _, has_vllm in per_rank)
    for rank, (written, metrics, _) in enumerate(per_rank):
        replica = rank if num_replicas > 1 else 0
        for seed, responses in enumerate(written):
            wanted = expected[seed][replica::num_replicas]
            assert tokens(responses) == [token_ids for token_ids, _ in wanted]
            assert {response.weight_version for response in responses} == {seed}
            for response, (_, log_probs) in zip(responses, wanted, strict=True):
                assert response.log_probs == pytest.approx(log_probs, rel=0, abs=1e-4)
        assert metrics == per_rank[0][1]
    assert metrics["rollout/sync_bytes"] > 0 and metrics["rollout/servers_alive"] == 2
    assert tokens(per_rank[0][0][0]) != tokens(per_rank[0][0][1])


def interrupted(servers: Reach) -> tuple[str, list[Response]]:
    """Return a server's answer to an update that lacks a bucket, and all responses after a complete update.

    An earlier trainer has left other servers with half-loaded weights.
    """
    from megatron_selfdistill.engines.vllm.transfer import SharedMemoryTransfer
    from megatron_selfdistill.engines.vllm.weight_update import WeightUpdate
    from megatron_selfdistill.interop.export import Exporter

    chunks, grid = models.build(MODEL, models.parallel(), seed=1)
    clients = [VllmServer(address, servers.token, 60) for address in servers.addresses]
    stream = Exporter(chunks, grid, FAMILY.rules(MODEL), bucket_bytes=60_000).stream()
    buckets = [list(bucket) for bucket in stream]
    transfer = SharedMemoryTransfer("/dev/shm")
    with_a_gap = WeightUpdate(transfer, clients[:1], 9)
    for bucket in buckets[:-1]:
        with_a_gap.send(bucket)
    with_a_gap.finish()
    broken_off = WeightUpdate(transfer, clients[1:], 9)
    for bucket in buckets[:3]:
        broken_off.send(bucket)
    broken_off.settle()
    transfer.close()
    models.fill_from_names(chunks, 0)
    with sampler(chunks, grid, servers) as built:
        built.update_weights(2)
        return str(next(iter(with_a_gap.failures.values()))), built.generate(requests(12), GREEDY)


def test_half_an_update_is_refused_and_leaves_nothing_behind(ranks, servers, expected):
    [(sentence, responses)] = ranks.run(interrupted, servers.reach, world_size=1, timeout=TIMEOUT)
    assert "parameters of vLLM's model got no weights" in sentence
    assert tokens(responses) == [token_ids for token_ids, _ in expected[0]]


def kept(servers: Reach, params: SamplingParams) -> Across:
    chunks, grid = models.build(MODEL, models.parallel())
    with sampler(chunks, grid, servers, max_staleness=1) as built:
        return across_an_update(built, params, lambda seed: models.fill_from_names(chunks, seed))


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "drawn"])
def test_responses_under_way_go_on_with_new_weights_as_if_those_had_read_their_tokens(ranks, servers, greedy):
    params = SamplingParams(max_new_tokens=150, temperature=0.0 if greedy else 1.0)
    assert_new_weights_go_on(*ranks.run(kept, servers.reach, params, world_size=1, timeout=TIMEOUT)[0])


def test_without_the_token_nothing_but_health_is_answered(servers):
    server = servers.processes[1].address
    run(VllmServer(server).health())
    for path in ("/weight_info", "/v1/models", "/get_world_size", "/metrics", "/docs"):
        for headers in ({}, {"Authorization": f"Bearer {servers.reach.token[:-1]}"}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(server + path, headers=headers), timeout=60)
            assert refused.value.code == 401, path
    assert all(servers.reach.token not in one.log.read_text() for one in servers.processes)
    assert all(
        servers.reach.token not in command for command in processes_of(servers.processes[1].process.pid).values()
    )


def killed_with_batches_ahead(servers: Reach, process: int) -> tuple[list[Response], list[Response], dict[str, float]]:
    """Kill a server while two batches are under way, send weights to the other one, and collect both batches.

    Return the responses of a batch without disturbance, those of the same requests in two batches, and the metrics.
    The server that is killed has been suspended before it gets a request.  The other server gets one request of each
    batch at a time, so that most requests are left when it has ended some of them.
    """
    chunks, grid = models.build(MODEL, models.parallel())
    everything = requests(96, longest=30)
    with sampler(chunks, grid, servers, max_staleness=2) as built:
        built.update_weights(5)
        undisturbed = built.generate(everything, DRAWN)
        built.metrics()
        second = VllmServer(servers.addresses[1], servers.token, TIMEOUT)
        num_tokens = run(second.num_tokens())
        os.kill(process, signal.SIGSTOP)
        with patch.object(server_batch, "MAX_IN_FLIGHT", 1):
            tickets = [built.start(everything[first::2], DRAWN, used_at=6 + first) for first in range(2)]
            while run(second.num_tokens()) == num_tokens:
                time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        built.update_weights(6)
        batches = [built.collect(ticket) for ticket in tickets]
        disturbed = [batches[i % 2][i // 2] for i in range(len(everything))]
        return undisturbed, disturbed, built.metrics()


def test_a_killed_server_loses_no_request_and_leaves_no_process(ranks, servers):
    process = servers.processes[0].process
    [(undisturbed, disturbed, after)] = ranks.run(
        killed_with_batches_ahead, servers.reach, process.pid, world_size=1, timeout=TIMEOUT
    )
    assert process.wait() == -signal.SIGKILL
    assert {response.weight_version for response in disturbed} == {5, 6}
    for before, response in zip(undisturbed, disturbed, strict=True):
        assert len(response.token_ids) == len(before.token_ids) == DRAWN.max_new_tokens
        same = response.weight_spans[0][1] if response.weight_spans else DRAWN.max_new_tokens
        assert response.token_ids[:same] == before.token_ids[:same]
    assert after["rollout/requests_retried"] > 0 and after["rollout/servers_alive"] == 1
    assert_session_ends(process.pid)


def test_servers_that_a_run_starts_serve_it_and_end_with_it(servers, expected, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "support"), str(HERE.parents[2])]),
    }
    environment.pop(TOKEN_VARIABLE, None)
    command = [sys.executable, str(HERE / "run_with_a_server.py"), str(tmp_path), str(servers.reach.hf_config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            said = (line for line in run.stdout if line.startswith(("server ", "tokens ")))
            lines = list(itertools.islice(said, 2))  # the run's own process for HTTP keeps the pipe open
            server = int(lines[0].split()[1])
            assert re.findall(r"\d+", lines[1]) == [str(token) for token in expected[0][0][0]]
        finally:
            run.kill()
    assert_session_ends(server)


def test_a_server_ends_although_its_engine_never_answers_a_request(servers):
    """The server waits for the answers to calls of methods that its engine had not finished when it was ended."""
    process = servers.processes[1].process
    [engine] = [pid for pid, line in processes_of(process.pid).items() if "EngineCore" in line]
    failures: list[EngineError] = []

    def ask() -> None:
        try:
            run(VllmServer(servers.processes[1].address, servers.reach.token, TIMEOUT).workers())
        except EngineError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    os.kill(engine, signal.SIGSTOP)
    asking.start()
    time.sleep(1.0)  # the request is with the engine
    process.terminate()
    asking.join()
    assert failures, "the request was neither answered nor dropped"
    process.wait()
    assert_session_ends(process.pid)
