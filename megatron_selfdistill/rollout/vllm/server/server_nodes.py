# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The nodes of one vLLM server that does not fit on one: they meet before the model is loaded, and end together.

Left alone, vLLM's head does not notice that a worker node is gone: it says that it is healthy, and waits in its next
collective for ever; nor does a worker node notice that its head is gone, and it keeps its GPUs.  So each worker node
holds a connection to the head, over which nothing is said: its end is the end of the server.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_selfdistill.rollout.vllm.server.server_names import TOKEN_VARIABLE, own_address

MEET_SECONDS = 1800.0
"""How long nodes wait for each other: one may still be fetching its container."""

_WELCOME = b"welcome\n"
_HELLO_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_LONGEST_HELLO = 200
# A node that loses its power or its cable says no goodbye: it is asked after 10 s of silence, four times in 20 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


@dataclass(frozen=True)
class Node:
    """One node of a server, as vLLM's options of the same names say."""

    nnodes: int
    node_rank: int
    """0 is the head, which answers HTTP."""
    master_addr: str
    """Of the head, by which the others reach it."""
    master_port: int
    """vLLM's workers meet there; the nodes at `meeting_port`."""

    @property
    def meeting_port(self) -> int:
        return self.master_port + 1


def why_not(nnodes: int, node_rank: int, master_addr: str | None, token: str) -> str | None:
    """A sentence where there can be no such node."""
    if nnodes < 1 or not 0 <= node_rank < nnodes:
        return f"expected --node-rank from 0 to --nnodes - 1, got --node-rank {node_rank} of --nnodes {nnodes}"
    if nnodes == 1:
        return None
    if not master_addr:
        return (
            f"--nnodes {nnodes} needs --master-addr, the address of node rank 0 by which the others reach it, the same "
            "on all of them"
        )
    if not token and not is_loopback(master_addr):
        return (
            f"a server of --nnodes {nnodes} that meet at {master_addr} needs the environment variable "
            f"{TOKEN_VARIABLE}, the same secret on all of them"
        )
    return None


def why_not_gpus(nnodes: int, num_gpus: int, visible: int | None) -> str | None:
    """A sentence where a server of ``num_gpus`` workers cannot be cut over its nodes; ``visible``: GPUs of this one,
    None on a CPU."""
    each, left = divmod(num_gpus, nnodes)
    if left:
        return (
            f"a server of {num_gpus} GPUs cannot be cut into --nnodes {nnodes} equal parts: make "
            f"--tensor-parallel-size a multiple of {nnodes}"
        )
    if nnodes > 1 and visible not in (None, each):
        # vLLM tells by this number which of its workers share a node.
        return (
            f"a server of {num_gpus} GPUs over --nnodes {nnodes} has {each} on each, but this node shows {visible}: "
            f"set CUDA_VISIBLE_DEVICES to {each} of them"
        )
    return None


def is_loopback(host: str) -> bool:
    """``host`` is this machine whoever says so; any other name may mean anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_environment(node: Node) -> dict[str, str]:
    """What vLLM and gloo are told of this node's address: that on the way to the head.  Their own guesses (the way to
    the internet, the host's name) can be an address that no other node reaches."""
    address = own_address(node.master_addr, node.master_port)
    if is_loopback(address) != is_loopback(node.master_addr):
        return {}  # on the head its own name may stand for loopback: better vLLM's guess
    environment = {"VLLM_HOST_IP": address}
    interface = _interface(address)
    return environment | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})


def meet(node: Node, token: str, lost: Callable[[str], None], timeout_s: float = MEET_SECONDS) -> None:
    """Return when all nodes of the server are there.  From then on ``lost`` is called, in a thread and with a sentence,
    once on each node that outlives another: the head's end is that of all, and a worker node's is the head's.

    Raises TimeoutError where they have not met within ``timeout_s``, ConnectionError where a node ended meanwhile or
    has another token.
    """
    deadline = time.monotonic() + timeout_s
    if node.node_rank == 0:
        peers = _gather(node, token, deadline)
        names = [f"node rank {rank} of this server" for rank in sorted(peers)]
        _watch([peers[rank] for rank in sorted(peers)], names, lost)
    else:
        _watch([_join(node, token, deadline)], [f"the head of this server, {node.master_addr},"], lost)


def _gather(node: Node, token: str, deadline: float) -> dict[int, socket.socket]:
    """On the head: a connection from every other node, by its rank.  What is no hello of one is turned away."""
    peers: dict[int, socket.socket] = {}
    with _listener(node) as listener:
        while len(peers) < node.nnodes - 1:
            ready, _, _ = select.select([listener, *peers.values()], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(1, node.nnodes) if rank not in peers]
                raise TimeoutError(f"node ranks {missing} of this server have not come to port {node.meeting_port}")
            for rank, peer in peers.items():
                if peer in ready:  # they have nothing to say
                    raise ConnectionError(f"node rank {rank} of this server ended before the others came")
            if listener in ready:
                stranger, _ = listener.accept()
                told = _rank_of(stranger, node, token)
                if told is None or told in peers:
                    stranger.close()
                else:
                    peers[told] = stranger
    for peer in peers.values():
        peer.sendall(_WELCOME)
    return peers


def _rank_of(peer: socket.socket, node: Node, token: str) -> int | None:
    """The node rank that ``peer`` proves to have."""
    peer.settimeout(_HELLO_SECONDS)
    try:
        said = peer.makefile("rb").readline(_LONGEST_HELLO)
    except OSError:
        return None
    for rank in range(1, node.nnodes):
        if hmac.compare_digest(said, _hello(rank, node.nnodes, token)):
            return rank
    return None


def _join(node: Node, token: str, deadline: float) -> socket.socket:
    """On another node: the connection to the head, once all are there."""
    where = f"{node.master_addr}:{node.meeting_port}"
    while True:
        try:
            head = socket.create_connection((node.master_addr, node.meeting_port), _HELLO_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the head of this server cannot be reached at {where}: {error}") from error
            time.sleep(_RETRY_SECONDS)
    head.settimeout(max(1.0, deadline - time.monotonic()))
    head.sendall(_hello(node.node_rank, node.nnodes, token))
    try:
        answer = head.recv(len(_WELCOME))
    except TimeoutError as error:
        raise TimeoutError(f"the head of this server at {where} still waits for other nodes") from error
    except OSError:
        answer = b""
    if not answer:
        raise ConnectionError(
            f"the head of this server at {where} has ended or does not take this node: expected the same "
            f"{TOKEN_VARIABLE} and --nnodes {node.nnodes} there, and nobody else with --node-rank {node.node_rank}"
        )
    return head


def _watch(peers: Sequence[socket.socket], names: Sequence[str], lost: Callable[[str], None]) -> None:
    for peer in peers:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        # A child that was forked and outlives this process must not hold the connection open.
        os.register_at_fork(after_in_child=peer.close)

    def watch() -> None:
        while True:
            ready, _, _ = select.select(peers, [], [])
            for peer, name in zip(peers, names, strict=True):
                if peer in ready and _has_ended(peer):
                    lost(f"{name} is gone, and this node ends with it")
                    return

    threading.Thread(target=watch, name="node watch", daemon=True).start()


def _has_ended(peer: socket.socket) -> bool:
    try:
        return not peer.recv(_LONGEST_HELLO)
    except OSError:
        return True


def _hello(rank: int, nnodes: int, token: str) -> bytes:
    """What node ``rank`` says; only who knows the token can."""
    name = f"selfdistill node {rank} of {nnodes}"
    return f"{name} {hmac.new(token.encode(), name.encode(), hashlib.sha256).hexdigest()}\n".encode()


def _listener(node: Node) -> socket.socket:
    if is_loopback(node.master_addr):
        family = socket.AF_INET6 if ":" in node.master_addr else socket.AF_INET
        return socket.create_server((node.master_addr, node.meeting_port), family=family, backlog=node.nnodes)
    # Every interface, as torch's own store does: on the head its name may stand for an address that others do not see.
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", node.meeting_port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=node.nnodes
        )
    return socket.create_server(("", node.meeting_port), backlog=node.nnodes)


def _interface(address: str) -> str | None:
    """The network interface that has ``address``."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    return None
