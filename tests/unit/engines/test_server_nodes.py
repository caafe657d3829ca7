# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The nodes of one server: which there can be, that they meet, and that they end together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from events import wait_until
from ports import neighbouring_ports

from megatron_selfdistill.engines.vllm.server import server_nodes
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.engines.vllm.server.server_nodes import (
    ServerNode,
    meet,
    network_environment,
    why_not,
    why_not_gpus,
)

REPOSITORY = Path(__file__).resolve().parents[3]
# It leaves a child behind, as vLLM does, which must not keep anybody waiting.
NODE = """
import os, sys, time
from megatron_selfdistill.engines.vllm.server.server_nodes import ServerNode, meet

def lost(why):
    print(why, flush=True)
    os._exit(7)

rank, port = map(int, sys.argv[1:])
meet(ServerNode(3, rank, "127.0.0.1", port), "secret", lost)
if os.fork() == 0:
    os.close(1)
else:
    print("met", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("refused", "arguments", "word"),
    [
        (why_not, (1, 0, None, ""), None),
        (why_not, (2, 1, "127.0.0.1", ""), None),
        (why_not, (2, -1, "node7", "secret"), "--node-rank"),
        (why_not, (2, 1, None, "secret"), "--master-addr"),
        (why_not, (2, 1, "node7", ""), TOKEN_VARIABLE),
        (why_not_gpus, (1, 3, 8), None),
        (why_not_gpus, (2, 2, None), None),
        (why_not_gpus, (3, 16, 8), "--nnodes 3"),
        (why_not_gpus, (2, 8, 8), "CUDA_VISIBLE_DEVICES to 4"),
    ],
)
def test_nodes_that_cannot_be_are_refused(refused, arguments, word):
    refusal = refused(*arguments)
    assert refusal is None if word is None else word in (refusal or "")


def test_a_node_is_told_its_address_on_the_way_to_the_head(monkeypatch):
    assert network_environment(ServerNode(2, 1, "127.0.0.1", 29501)) == {
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    # On some systems the head's own name leads to 127.0.1.1 there, which is nobody else's way to it.
    monkeypatch.setattr(server_nodes, "own_address", lambda host, port: "127.0.0.1")
    assert network_environment(ServerNode(2, 0, "node7", 29501)) == {}


@pytest.fixture
def port() -> int:
    return neighbouring_ports()


@pytest.fixture
def nodes(port) -> Iterator[list[subprocess.Popen[str]]]:
    """Three, which have met."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with contextlib.ExitStack() as ends:
        started = {}
        for rank in (1, 0, 2):  # in any order
            command = [sys.executable, "-c", NODE, str(rank), str(port)]
            started[rank] = ends.enter_context(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
            )
            ends.callback(os.killpg, started[rank].pid, signal.SIGKILL)
        assert [one.stdout.readline() for one in started.values()] == ["met\n"] * 3
        yield [started[rank] for rank in range(3)]


def output_of(one: subprocess.Popen[str]) -> str:
    assert one.wait() == 7
    return one.stdout.read()


def test_when_the_head_is_killed_every_node_ends(nodes):
    nodes[0].kill()
    assert all("the head of this server, 127.0.0.1, has ended" in output_of(one) for one in nodes[1:])


def test_when_a_node_is_killed_the_head_ends_and_with_it_the_others(nodes):
    nodes[2].kill()
    assert output_of(nodes[0]) == "node rank 2 of this server has ended, and this node ends with it\n"
    assert "the head of this server" in output_of(nodes[1])


def lead(nnodes: int, port: int) -> Future[None]:
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(meet(ServerNode(nnodes, 0, "127.0.0.1", port), "secret", print))
        except OSError as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def connected(port: int) -> socket.socket:
    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))

    return wait_until(connect)


def test_strangers_and_nodes_with_another_token_do_not_count(port):
    outcome = lead(2, port)
    guesses = [server_nodes._hello(1, 2, "guessed"), server_nodes._hello(1, 3, "secret")]
    for hello in (b"", b"GET / HTTP/1.1\r\n\r\n", *guesses):
        with connected(port + 1) as stranger:
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(99) == b""
    with pytest.raises(ConnectionError, match=f"{TOKEN_VARIABLE} and --nnodes 2"):
        meet(ServerNode(2, 1, "127.0.0.1", port), "guessed", print)
    assert not outcome.done()
    meet(ServerNode(2, 1, "127.0.0.1", port), "secret", print)
    assert outcome.result() is None


def test_nodes_that_do_not_come_are_named(port):
    with pytest.raises(TimeoutError, match=rf"node ranks \[1, 2\] of the server have not connected to port {port + 1}"):
        meet(ServerNode(3, 0, "127.0.0.1", port), "", print, 0.1)
    with pytest.raises(TimeoutError, match=f"cannot be reached at 127.0.0.1:{port + 1}"):
        meet(ServerNode(3, 1, "127.0.0.1", port), "", print, 0.1)


def test_a_node_that_ends_before_the_others_came_ends_the_server(port):
    outcome = lead(3, port)
    with connected(port + 1) as other:
        other.sendall(server_nodes._hello(2, 3, "secret"))
    with pytest.raises(ConnectionError, match="node rank 2 of this server ended before the other nodes came"):
        outcome.result()


def test_a_node_waits_for_all_the_others(port):
    """But not for ever: it has reached a head that says nothing."""
    with socket.create_server(("127.0.0.1", port + 1)), pytest.raises(TimeoutError, match="still waits for other"):
        meet(ServerNode(3, 1, "127.0.0.1", port), "secret", print, 1.0)
