# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""HTTP requests to one vLLM server that wait as long as the server shows signs of life."""

from __future__ import annotations

import http.client
import json
import re
import select
import threading
import time
import urllib.parse
from typing import Any

from megatron_selfdistill.distributed import stop
from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError

_POLL_SECONDS = 1.0
# Timeout of requests to a server that has let one request wait for `timeout_s`, until it answers again.
_SILENT_TIMEOUT_SECONDS = 10.0
# The patience with a silent server once a signal has asked the run to end: the same signal may have ended the server,
# and the run needs the rest of its time for a checkpoint.
_LEAVING_SECONDS = 15.0
# The greatest length of an answer unless the caller states another one: the longest are results of all workers.
_MAX_BYTES = 2**27
_PIECE_BYTES = 2**16
_LOOKS = 4  # the number of times per timeout that a silent server must state its token count
_GIVEN_UP = "given up, since another request failed or the sampler was closed"
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)


class PatientHttp:
    """The requests of this process to the server at ``address``, with ``token`` unless it is empty.

    Any number of threads may use the object at once.  No connection, and silence, are an `EngineError` with the address
    and the cause.  A server is silent when it gives no answer to any request for ``timeout_s`` while an answer is due
    and, where the answer is a response, generates no token either.  After a signal to end (distributed/stop.py), a
    silence of a few seconds is enough.  An answer that takes longer than ``timeout_s`` from its first byte to its last,
    and an answer that is too long, are an `EngineError` too.
    """

    def __init__(self, address: str, token: str, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._url = urllib.parse.urlsplit(address)
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._last_sign = 0.0
        self._silent = False
        self._interrupted = threading.Event()
        self._looking = threading.Lock()
        self._looked = 0.0
        self._num_tokens: float | None = None

    @property
    def host(self) -> str:
        """Name or number of the server's host, without the port."""
        return self._url.hostname or ""

    @property
    def port(self) -> int:
        """Port of the server, by default that of the scheme."""
        return self._url.port or (443 if self._url.scheme == "https" else 80)

    def interrupt(self) -> None:
        """Let every request that waits in another thread raise `EngineError`; the server drops the request."""
        self._interrupted.set()
        self._interrupted = threading.Event()

    def answer(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout_s: float | None = None,
        generates: bool = False,
        max_bytes: int = _MAX_BYTES,
    ) -> tuple[int, str]:
        """Return the status and the text of an answer, which is a sign of life.

        ``generates``: whether the server generates tokens for the request.  ``max_bytes``: the greatest length of the
        answer.
        """
        status, text = self._exchange(method, path, body, timeout_s, generates, max_bytes)
        self._last_sign = time.monotonic()
        return status, text

    def num_tokens(self, timeout_s: float | None = None) -> float | None:
        """Return the tokens that the server has read and generated since its start; None where it keeps no count."""
        status, text = self._exchange("GET", "/metrics", None, timeout_s)
        counts = _TOKENS.findall(text) if status == 200 else []
        try:
            return sum(map(float, counts)) if counts else None
        except ValueError as error:
            raise EngineError(f"{self.address}: expected numbers of tokens from /metrics: {error}") from error

    def _exchange(
        self,
        method: str,
        path: str,
        body: Any,
        timeout_s: float | None = None,
        generates: bool = False,
        max_bytes: int = _MAX_BYTES,
    ) -> tuple[int, str]:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if self._silent:
            timeout_s = min(timeout_s, _SILENT_TIMEOUT_SECONDS)
        interrupted = self._interrupted
        connection = self._connection(min(timeout_s, self.timeout_s))
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, self._url.path + path, payload, self._headers)
            self._wait(connection, timeout_s, interrupted, generates)
            answer = connection.getresponse()
            status, text = answer.status, self._read(answer, timeout_s, interrupted, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            self._silent = self._silent or isinstance(error, TimeoutError)
            raise EngineError(f"{self.address}: {method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        self._silent = False
        return status, text.decode(errors="replace")

    def _read(
        self, answer: http.client.HTTPResponse, timeout_s: float, interrupted: threading.Event, max_bytes: int
    ) -> bytes:
        """Return the whole of an answer that has begun."""
        began, read = time.monotonic(), bytearray()
        too_long = (answer.length or 0) > max_bytes
        while not too_long and (piece := answer.read1(_PIECE_BYTES)):
            read += piece
            too_long = len(read) > max_bytes
            patience_s = min(timeout_s, _LEAVING_SECONDS) if stop.asked() else timeout_s
            if time.monotonic() - began > patience_s:
                raise TimeoutError(f"no end of the answer within {patience_s:g} s, after {len(read)} bytes")
            if interrupted.is_set():
                raise ConnectionAbortedError(_GIVEN_UP)
        if too_long:
            raise http.client.HTTPException(f"expected an answer of at most {max_bytes} bytes, got a longer one")
        if answer.length:
            raise http.client.IncompleteRead(bytes(read), answer.length)
        return bytes(read)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout_s)

    def _wait(
        self, connection: http.client.HTTPConnection, timeout_s: float, interrupted: threading.Event, generates: bool
    ) -> None:
        """Return when the answer begins.

        The time that a response takes is unknown, so the timeout starts again with each answer that another thread gets
        and, where the server ``generates`` tokens for the request, whenever the server's count of tokens has grown.
        """
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        since, leaving = time.monotonic(), False
        while True:
            if stop.asked() and not leaving:  # a silence before the signal does not count
                since, leaving, timeout_s = time.monotonic(), True, min(timeout_s, _LEAVING_SECONDS)
            left = max(since, self._last_sign) + timeout_s - time.monotonic()
            if left <= 0:
                why = ", and a signal has asked the run to end" if leaving else ""
                raise TimeoutError(f"no {'token' if generates else 'answer'} within {timeout_s:g} s{why}")
            if interrupted.is_set():
                raise ConnectionAbortedError(_GIVEN_UP)
            if poll.poll(1000 * min(left, _POLL_SECONDS, timeout_s / _LOOKS)):
                return
            if generates:
                self._look(since, left, timeout_s / _LOOKS)

    def _look(self, since: float, left: float, pause_s: float) -> None:
        """Note a sign of life if the server's count of tokens has grown since the last look.

        One of the waiting threads looks for all of them, and only if the server was silent for ``pause_s``.
        ``since``: the time from which silence counts; ``left``: the seconds in which the server must state its count.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            heard = max(since, self._last_sign, self._looked)
            if time.monotonic() - heard < pause_s:
                return
            num_tokens = self.num_tokens(left)
            self._looked = time.monotonic()
            if num_tokens != self._num_tokens:
                self._num_tokens, self._last_sign = num_tokens, self._looked
                beat()
        except EngineError:
            self._looked = time.monotonic()  # no sign of life: the thread that waits times out
        finally:
            self._looking.release()
