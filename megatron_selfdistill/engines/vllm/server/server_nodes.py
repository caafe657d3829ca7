# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The nodes of one vLLM server that does not fit on one node: they meet before the model is loaded, and end together.

By itself vLLM's head does not notice that a worker node has ended: it reports that it is healthy, and waits in its next
collective for ever.  A worker node does not notice either that its head has ended, and keeps its GPUs.  So each worker
node holds a connection to the head, over which no data goes: the end of the connection is the end of the server.
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

from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE, own_address

MEET_SECONDS = 1800.0
"""Seconds in which all nodes must meet: a node may still be fetching its container."""

_WELCOME = b"welcome\n"
_HELLO_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_LONGEST_HELLO = 200
# A node that loses its power or its cable does not close its connections: TCP asks it after 10 s of silence, then every
# 5 s, and ends the connection after four questions without an answer.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


@dataclass(frozen=True)
class ServerNode:
    """One node of a server, with vLLM's options of the same names."""

    nnodes: int
    node_rank: int
    """Rank of this node; 0 is the head, which answers HTTP."""
    master_addr: str
    """Address by which the other nodes reach the head."""
    master_port: int
    """Port of the head at which vLLM's workers meet; the nodes meet at `meeting_port`."""

    @property
    def meeting_port(self) -> int:
        """Port of the head at which the nodes meet."""
        return self.master_port + 1


def why_not(nnodes: int, node_rank: int, master_addr: str | None, token: str) -> str | None:
    """Return a message where such a node cannot exist, else None."""
    if not 0 <= node_rank < nnodes or (nnodes > 1 and not master_addr):
        return (
            "expected --node-rank from 0 to --nnodes - 1, and --master-addr with --nnodes above 1, got "
            f"--nnodes {nnodes} --node-rank {node_rank} --master-addr {master_addr}"
        )
    if nnodes > 1 and not token and not is_loopback(str(master_addr)):
        return f"a server of --nnodes {nnodes} needs the environment variable {TOKEN_VARIABLE}, one secret for all"
    return None


def why_not_gpus(nnodes: int, num_gpus: int, visible: int | None) -> str | None:
    """Return a message where a server of ``num_gpus`` workers cannot be split over its nodes, else None.

    ``visible``: the number of GPUs of this node, None on a CPU.
    """
    each, left = divmod(num_gpus, nnodes)
    if left:
        return f"a server of {num_gpus} GPUs cannot be cut into --nnodes {nnodes} equal parts"
    if nnodes > 1 and visible not in (None, each):
        # vLLM concludes from this number which of its workers share a node.
        return (
            f"a server of {num_gpus} GPUs over --nnodes {nnodes} has {each} on each, but this node has {visible}: "
            f"set CUDA_VISIBLE_DEVICES to {each} of them"
        )
    return None


def is_loopback(host: str) -> bool:
    """Return whether ``host`` means this machine on every machine; any name but localhost may mean another machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_environment(node: ServerNode) -> dict[str, str]:
    """Return the environment variables that give vLLM and gloo this node's address on the way to the head.

    The addresses that vLLM and gloo would choose (the route to the internet, the host's name) may be unreachable for
    other nodes.
    """
    import psutil

    address = own_address(node.master_addr, node.master_port)
    if is_loopback(address) != is_loopback(node.master_addr):
        return {}  # on the head its own name may stand for loopback, and vLLM's guess is better
    environment = {"VLLM_HOST_IP": address}
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            environment.setdefault("GLOO_SOCKET_IFNAME", str(name))
    return environment


def meet(node: ServerNode, token: str, lost: Callable[[str], None], timeout_s: float = MEET_SECONDS) -> None:
    """Return when all nodes of the server have come, and watch them from then on.

    ``lost`` is called once, in a thread and with a message, on each node that outlives another: the head's end concerns
    all nodes, and a worker node's end concerns the head.

    Raises: TimeoutError where they have not met within ``timeout_s``, ConnectionError where a node ended meanwhile or
    has another token.
    """
    deadline = time.monotonic() + timeout_s
    if node.node_rank == 0:
        peers = _gather(node, token, deadline)
        names = [f"node rank {rank} of this server" for rank in sorted(peers)]
        _watch([peers[rank] for rank in sorted(peers)], names, lost)
    else:
        _watch([_join(node, token, deadline)], [f"the head of this server, {node.master_addr},"], lost)


def _gather(node: ServerNode, token: str, deadline: float) -> dict[int, socket.socket]:
    """Return, on the head, a connection from every other node, by its rank; other connections are closed."""
    peers: dict[int, socket.socket] = {}
    with _listener(node) as listener:
        while len(peers) < node.nnodes - 1:
            ready, _, _ = select.select([listener, *peers.values()], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(1, node.nnodes) if rank not in peers]
                raise TimeoutError(f"node ranks {missing} of the server have not connected to port {node.meeting_port}")
            for rank, peer in peers.items():
                if peer in ready:  # a node sends nothing more, so its connection has ended
                    raise ConnectionError(f"node rank {rank} of this server ended before the other nodes came")
            if listener in ready:
                stranger, _ = listener.accept()
                proved = _rank_of(stranger, node, token)
                if proved is None or proved in peers:
                    stranger.close()
                else:
                    peers[proved] = stranger
    for peer in peers.values():
        peer.sendall(_WELCOME)
    return peers


def _rank_of(peer: socket.socket, node: ServerNode, token: str) -> int | None:
    peer.settimeout(_HELLO_SECONDS)
    try:
        hello = peer.makefile("rb").readline(_LONGEST_HELLO)
    except OSError:
        return None
    for rank in range(1, node.nnodes):
        if hmac.compare_digest(hello, _hello(rank, node.nnodes, token)):
            return rank
    return None


def _join(node: ServerNode, token: str, deadline: float) -> socket.socket:
    """Return, on another node, the connection to the head, once all nodes have come."""
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
            f"{TOKEN_VARIABLE} and --nnodes {node.nnodes} there, and no other node with --node-rank {node.node_rank}"
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
                    lost(f"{name} has ended, and this node ends with it")
                    return

    threading.Thread(target=watch, name="node watch", daemon=True).start()


def _has_ended(peer: socket.socket) -> bool:
    try:
        return not peer.recv(_LONGEST_HELLO)
    except OSError:
        return True


def _hello(rank: int, nnodes: int, token: str) -> bytes:
    """Return the message with which node ``rank`` proves that it knows the token."""
    name = f"selfdistill node {rank} of {nnodes}"
    return f"{name} {hmac.new(token.encode(), name.encode(), hashlib.sha256).hexdigest()}\n".encode()


def _listener(node: ServerNode) -> socket.socket:
    if is_loopback(node.master_addr):
        family = socket.AF_INET6 if ":" in node.master_addr else socket.AF_INET
        return socket.create_server((node.master_addr, node.meeting_port), family=family, backlog=node.nnodes)
    # Listen on every interface, as torch's own store does: on the head its name may stand for an address that the other
    # nodes do not see.
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", node.meeting_port), family=family, dualstack_ipv6=dual, backlog=node.nnodes)
