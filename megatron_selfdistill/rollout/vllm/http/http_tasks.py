# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What rank 0 asks of the process that speaks HTTP for it, and the words for the answers.

Rank 0 sends one part, a pickle of (number, `ServerAccess`, task) with one of the tasks below, and gets one message per
number.  Its first part is JSON: the number, with the ``error`` and whether the server has ``refused`` the request, or
with what the task says.  Numbers are from 1 on; a message with the number 0 says that a server has shown signs of life.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.rollout.vllm.engine_output import EngineRequest

_MAX_PARTS = 8

Parts = Sequence[bytes | memoryview]


class Messages:
    """One end of a connection.  Any number of threads may send at once; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        """Use ``end``, a Unix socket of the kind SOCK_SEQPACKET."""
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Messages, Messages]:
        """Return both ends of a new connection."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """Return the descriptor of this end, to wait for it."""
        return self._socket.fileno()

    def send(self, *parts: bytes | memoryview) -> None:
        """Send a message of up to 8 parts, not all of them empty.

        Raises: OSError where the other end is closed; BlockingIOError where this end does not block and the other end
        has many unread messages.
        """
        memory = os.memfd_create("message", os.MFD_CLOEXEC)
        try:
            lengths = [memoryview(part).nbytes for part in parts]
            if os.writev(memory, parts) != sum(lengths):
                raise OSError("a message does not fit into shared memory")
            socket.send_fds(self._socket, [struct.pack(f"<{len(parts)}q", *lengths)], [memory])
        finally:
            os.close(memory)

    def receive(self) -> list[memoryview] | None:
        """Return the parts of the next message, whose memory lives as long as they do; None at the end.

        Raises: BlockingIOError where this end does not block and there is no message.
        """
        try:
            packet, files, _, _ = socket.recv_fds(self._socket, 8 * _MAX_PARTS, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        if not packet:
            return None
        lengths = struct.unpack(f"<{len(packet) // 8}q", packet)
        try:
            whole = memoryview(mmap.mmap(files[0], sum(lengths), prot=mmap.PROT_READ))
        finally:
            os.close(files[0])
        parts, start = [], 0
        for length in lengths:
            parts.append(whole[start : start + length])
            start += length
        return parts

    def set_blocking(self, blocking: bool) -> None:
        """Let `send` and `receive` wait, or raise BlockingIOError instead."""
        self._socket.setblocking(blocking)

    def close(self) -> None:
        """Close this end; the other end receives None."""
        self._socket.close()


MAX_IN_FLIGHT = 512
"""Number of requests for responses that one server works on at once; further requests wait in the process."""


@dataclass(frozen=True)
class ServerAccess:
    """One client of one server; its requests share the memory of the server's signs of life."""

    key: int
    """A number that no other client of rank 0's process has."""
    address: str
    """The server's address, without a slash at its end."""
    token: str = field(repr=False)
    """The secret that is sent with every request, unless it is empty."""
    timeout_s: float
    """Seconds after which a silent server counts as dead."""


@dataclass(frozen=True)
class Ask:
    """A request other than for a response.

    The answer has ``status`` and ``media_type``, and its body as the second part.
    """

    method: str
    path: str
    body: Any = None
    """A JSON value, or None for no body."""
    timeout_s: float | None = None
    """Seconds in place of those of `ServerAccess`."""


@dataclass(frozen=True)
class Generate:
    """A request for a response.

    The answer has the fields of `EngineOutput` but the numbers of tokens, which are the parts behind the first: token
    ids in int32 and log-probs in float32.
    """

    request: EngineRequest
    model: str | None
    """The name of the adapter that takes part, or None."""
    vocab_size: int
    """Number of the model's tokens."""


@dataclass(frozen=True)
class Drop:
    """The requests of these numbers have no reader any more, and get no answer."""

    numbers: Sequence[int]


@dataclass(frozen=True)
class Leave:
    """A signal has asked the run to end, or counts no longer."""

    patience_s: float | None
    """Seconds of silence that are enough from now on; None for those of each request."""


Task = Ask | Generate | Drop | Leave
