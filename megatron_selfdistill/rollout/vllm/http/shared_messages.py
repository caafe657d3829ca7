# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Messages between two processes of one machine, whose bytes lie in shared memory.

Each message is a file without a name in memory (``memfd_create``); a socket carries its descriptor and the lengths of
its parts.  The kernel frees the memory with the last descriptor and the last mapping, also when a process is killed.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Sequence

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
