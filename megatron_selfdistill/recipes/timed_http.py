# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""HTTP requests with one deadline for the whole answer, headers and body, and with a greatest length of the body.

The timeout of a socket is the time between two bytes: an endpoint that sends a byte every second would never reach it.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any


class LongAnswerError(ValueError):
    """An answer whose body is longer than the caller takes."""


def post(url: str, payload: str, headers: Mapping[str, str], timeout_s: float, max_bytes: int) -> tuple[int, str]:
    """Send ``payload`` to ``url`` and return the status and the text of the answer.

    Raises: TimeoutError where the answer is not complete ``timeout_s`` seconds after the call; OSError without a
    connection; HTTPException for a broken answer; `LongAnswerError` for a body of more than ``max_bytes``.
    """
    deadline, place = time.monotonic() + timeout_s, urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.hostname or "", place.port, timeout=timeout_s)
    connection.response_class = functools.partial(_TimedAnswer, deadline)  # type: ignore[assignment]
    try:
        connection.request("POST", place.path, payload, dict(headers))
        answer = connection.getresponse()
        body = b"" if (answer.length or 0) > max_bytes else answer.read(max_bytes + 1)
        if len(body) > max_bytes or (answer.length or 0) > max_bytes:
            raise LongAnswerError(f"expected an answer of at most {max_bytes / 1e6:g} MB, got a longer one")
        if answer.length:
            raise http.client.IncompleteRead(body, answer.length)
        return answer.status, body.decode(errors="replace")
    finally:
        connection.close()


class _TimedAnswer(http.client.HTTPResponse):
    """An answer of which every byte must arrive before ``deadline``, a time of ``time.monotonic()``."""

    def __init__(self, deadline: float, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedBytes(sock, deadline))


class _TimedBytes(io.RawIOBase):
    """The bytes that ``sock`` receives before ``deadline``."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._socket, self._deadline = sock, deadline
        self._bytes = sock.makefile("rb", buffering=0)  # keeps the socket open until the answer is read

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what has arrived into ``buffer``, and return the number of bytes.  Raises: TimeoutError."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer was not complete")
        self._socket.settimeout(left)
        return self._bytes.readinto(buffer)

    def close(self) -> None:
        """Close the bytes, and with them the socket where the connection has closed it before."""
        self._bytes.close()
        super().close()
