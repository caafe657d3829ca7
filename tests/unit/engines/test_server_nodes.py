# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The nodes of one server: which there can be, that they meet, and that they end together."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import neighbouring_ports

from megatron_selfdistill.engines.vllm.server import serve, server_nodes
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.engines.vllm.server.server_nodes import (
    ServerNode,
    meet,
    network_environment,
    why_not,
    why_not_gpus,
)

REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE_S = 60.0
# It leaves a child behind, as vLLM does, which must not keep anybody waiting.
NODE = """
import os, sys, time
from megatron_selfdistill.engines.vllm.server.server_nodes import ServerNode, meet

def lost(why):
    print(why, flush=True)
    os._exit(7)

rank, port = map(int, sys.argv[1:])
meet(ServerNode(3, rank, "127.0.0.1", port), "secret", lost, 60.0)
if os.fork() == 0:
    os.close(1)
else:
    print("met", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("nnodes", "node_rank", "master_addr", "token", "words"),
    [
        (1, 0, None, "", None),
        (2, 1, "127.0.0.1", "", None),
        (2, -1, "node7", "secret", "expected --node-rank from 0 to --nnodes - 1"),
        (2, 1, None, "secret", "and --master-addr with --nnodes above 1"),
        (2, 1, "node7", "", TOKEN_VARIABLE),
    ],
)
def test_a_node_that_cannot_be_is_refused_with_a_sentence(nnodes, node_rank, master_addr, token, words):
    refusal = why_not(nnodes, node_rank, master_addr, token)
    assert refusal is None if words is None else words in (refusal or "")


@pytest.mark.parametrize(
    ("nnodes", "num_gpus", "visible", "words"),
    [
        (1, 3, 8, None),
        (2, 2, None, None),
        (3, 16, 8, "a server of 16 GPUs cannot be cut into --nnodes 3 equal parts"),
        (2, 8, 8, "has 4 on each, but this node has 8: set CUDA_VISIBLE_DEVICES to 4 of them"),
    ],
)
def test_gpus_that_do_not_fit_the_nodes_are_refused_with_a_sentence(nnodes, num_gpus, visible, words):
    refusal = why_not_gpus(nnodes, num_gpus, visible)
    assert refusal is None if words is None else words in (refusal or "")


def test_vllm_is_told_of_the_nodes_and_only_the_head_answers_requests():
    common = ["--hf-config=/model", "--tensor-parallel-size=16"]
    several = [*common, "--nnodes=2", "--master-addr=node7", "--master-port=31008"]
    head, other, alone = (
        serve.engine_arguments(serve.parser().parse_args(options), on_cpu=False)
        for options in (several, [*several, "--node-rank=1"], common)
    )
    nodes = ["--nnodes=2", "--master-addr=node7", "--master-port=31008", "--distributed-executor-backend=mp"]
    assert all(argument in head and argument in other for argument in [*nodes, "--tensor-parallel-size=16"])
    assert "--node-rank=0" in head and "--headless" not in head
    assert "--node-rank=1" in other and "--headless" in other
    assert not any(argument.startswith(("--nnodes", "--node-rank", "--master", "--distr")) for argument in alone)


def test_a_node_is_told_its_address_on_the_way_to_the_head(monkeypatch):
    assert network_environment(ServerNode(2, 1, "127.0.0.1", 29501)) == {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    # On some systems the head's own name leads to 127.0.1.1 there, which is nobody else's way to it.
    monkeypatch.setattr(server_nodes, "own_address", lambda host, port: "127.0.0.1")
    assert network_environment(ServerNode(2, 0, "node7", 29501)) == {}


@pytest.fixture
def nodes(port) -> Iterator[list[subprocess.Popen[str]]]:
    """Three, which have met."""
    command = [sys.executable, "-c", NODE]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(port)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for rank in (1, 0, 2)  # in any order
    ]
    started[0], started[1] = started[1], started[0]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == "met\n"
        yield started
    finally:
        for one in started:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


@pytest.fixture
def port() -> int:
    return neighbouring_ports()


def output_of(one: subprocess.Popen[str]) -> str:
    assert one.wait(PATIENCE_S) == 7 and one.stdout is not None
    return one.stdout.read()


def test_when_the_head_is_killed_every_node_ends(nodes):
    nodes[0].kill()
    assert [output_of(one) for one in nodes[1:]] == [
        "the head of this server, 127.0.0.1, has ended, and this node ends with it\n"
    ] * 2


def test_when_a_node_is_killed_the_head_ends_and_with_it_the_others(nodes):
    nodes[2].kill()
    assert output_of(nodes[0]) == "node rank 2 of this server has ended, and this node ends with it\n"
    assert "the head of this server" in output_of(nodes[1])


def test_strangers_and_nodes_with_another_token_do_not_count(port):
    ended = lead(2, port)
    for hello in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        server_nodes._hello(1, 2, "guessed"),
        server_nodes._hello(1, 3, "secret"),
    ):
        with connected(port + 1) as stranger:
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(99) == b""
    with pytest.raises(ConnectionError, match=f"expected the same {TOKEN_VARIABLE} and --nnodes 2 there"):
        meet(ServerNode(2, 1, "127.0.0.1", port), "guessed", print, PATIENCE_S)
    assert ended.empty()
    meet(ServerNode(2, 1, "127.0.0.1", port), "secret", print, PATIENCE_S)
    assert ended.get(timeout=PATIENCE_S) is None


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        except ConnectionRefusedError:  # nobody listens yet
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.timing
def test_nodes_that_do_not_come_are_named(port):
    with pytest.raises(TimeoutError, match=rf"node ranks \[1, 2\] of the server have not connected to port {port + 1}"):
        meet(ServerNode(3, 0, "127.0.0.1", port), "", print, 0.1)
    with pytest.raises(TimeoutError, match=f"cannot be reached at 127.0.0.1:{port + 1}"):
        meet(ServerNode(3, 1, "127.0.0.1", port), "", print, 0.1)


def test_a_node_that_ends_before_the_others_came_ends_the_server(port):
    raised = lead(3, port)
    with connected(port + 1) as other:
        other.sendall(server_nodes._hello(2, 3, "secret"))
    assert "node rank 2 of this server ended before the other nodes came" in str(raised.get(timeout=PATIENCE_S))


@pytest.mark.timing
def test_a_node_waits_for_all_the_others(port):
    lead(3, port)
    with pytest.raises(TimeoutError, match="still waits for other nodes"):
        meet(ServerNode(3, 1, "127.0.0.1", port), "secret", print, 1.0)


def lead(nnodes: int, port: int) -> queue.Queue[Exception | None]:
    """Run a head in a thread of its own, and return a queue with its outcome."""
    ended: queue.Queue[Exception | None] = queue.Queue()

    def run() -> None:
        try:
            meet(ServerNode(nnodes, 0, "127.0.0.1", port), "secret", print, PATIENCE_S)
            ended.put(None)
        except OSError as error:
            ended.put(error)

    threading.Thread(target=run, daemon=True).start()
    return ended
