# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""HTTP requests to one vLLM server that wait as long as the server shows signs of life."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.timed_http import HttpAnswer, HttpError, LongAnswerError, exchange, new_client

METRICS = "/metrics"
"""The path at which a server states its counts."""

# The greatest length of an answer unless the caller states another one: the longest are results of all workers.
_MAX_BYTES = 2**27
_LOOK_SECONDS, _LEAST_PAUSE_SECONDS = 1.0, 0.01
# Timeout of requests to a server that has let one request wait for `timeout_s`, until it answers again.
_SILENT_TIMEOUT_SECONDS = 10.0
_LOOKS = 4  # the number of times per timeout that a silent server must state its token count
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass
class Patience:
    """The patience with all servers once a signal has asked the run to end."""

    seconds: float | None = None
    """The silence after which a server then counts as dead; None before the signal."""
    since: float = 0.0
    """The time of the signal; a silence before it does not count."""


@dataclass(eq=False)
class _Wait:
    """A request that is under way."""

    timeout_s: float
    generates: bool
    deadline: asyncio.Timeout
    since: float = field(default_factory=time.monotonic)
    num_bytes: int | None = None
    """The number of the body's bytes so far; None before the headers have arrived."""

    def progress(self, num_bytes: int) -> None:
        if self.num_bytes is None:
            self.since = time.monotonic()
        self.num_bytes = num_bytes


class PatientHttp:
    """The requests of this process to the server at ``address``, with ``token`` unless it is empty.

    Any number of tasks may use the object at once.  No connection, and silence, are an `EngineError` with the address
    and the cause.  A server is silent when it gives no answer to any request for ``timeout_s`` while an answer is due
    and, where the answer is a response, generates no token either; headers that are not complete are no answer.  After
    a signal to end (`Patience`), a shorter silence is enough.  An answer that takes longer than ``timeout_s`` behind
    its headers, and an answer that is too long, are an `EngineError` too.
    """

    def __init__(
        self, address: str, token: str, timeout_s: float, patience: Patience, alive: Callable[[], None]
    ) -> None:
        """``alive`` is called when the server has generated tokens in a long silence."""
        self.address, self.timeout_s = address, timeout_s
        self._patience, self._alive = patience, alive
        self._client = new_client(address)
        self._headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}".encode()
        self._waits: set[_Wait] = set()
        self._watching: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._last_sign = self._looked = 0.0
        self._silent = False
        self._num_tokens: float | None = None

    async def answer(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        timeout_s: float | None = None,
        generates: bool = False,
        max_bytes: int = _MAX_BYTES,
        accept: str = "*/*",
        is_sign: bool = True,
    ) -> HttpAnswer:
        """Return an answer.

        ``generates``: whether the server generates tokens for the request.  ``max_bytes``: the greatest length of the
        answer.  ``accept``: the media types that the answer may have.  ``is_sign``: whether the answer is a sign of
        life.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if self._silent:
            timeout_s = min(timeout_s, _SILENT_TIMEOUT_SECONDS)
        url, headers = self.address + path, {**self._headers, "Accept": accept}
        deadline = asyncio.timeout(None)
        wait = _Wait(timeout_s, generates, deadline)
        try:
            async with deadline:
                self._watch(wait)
                answer = await exchange(self._client, method, url, content, headers, max_bytes, wait.progress)
        except TimeoutError:
            self._silent = True
            raise EngineError(f"{self.address}: {method} {path}: TimeoutError: {self._silence(wait)}") from None
        except (HttpError, LongAnswerError) as error:
            raise EngineError(f"{self.address}: {method} {path}: {error}") from error
        finally:
            self._waits.discard(wait)
        self._silent = False
        if is_sign:
            self._last_sign = time.monotonic()
        return answer

    def _watch(self, wait: _Wait) -> None:
        """Let ``wait`` end when its time is over; one task watches for all of them."""
        self._waits.add(wait)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch_all())

    async def _watch_all(self) -> None:
        while self._waits:
            pauses = [min(self._left(wait), wait.timeout_s / _LOOKS) for wait in self._waits]
            await asyncio.sleep(max(_LEAST_PAUSE_SECONDS, min(_LOOK_SECONDS, *pauses)))
            for wait in [wait for wait in self._waits if self._left(wait) <= 0]:
                self._waits.discard(wait)
                wait.deadline.reschedule(asyncio.get_running_loop().time())
            silent = [wait for wait in self._waits if self._may_look(wait)]
            if silent and (self._looking is None or self._looking.done()):
                self._looking = asyncio.create_task(self._look(max(map(self._left, silent))))

    def _left(self, wait: _Wait) -> float:
        """Return the seconds that are left to a request.

        The time that a response takes is unknown, so its timeout starts again with each answer of the server and,
        where the server generates tokens for the request, whenever the server's count of tokens has grown.
        """
        since = wait.since if wait.num_bytes is not None else max(wait.since, self._last_sign)
        return max(since, self._patience.since) + self._timeout_s(wait) - time.monotonic()

    def _timeout_s(self, wait: _Wait) -> float:
        leaving = self._patience.seconds
        return wait.timeout_s if leaving is None else min(wait.timeout_s, leaving)

    def _silence(self, wait: _Wait) -> str:
        what = "token" if wait.generates else "answer"
        if wait.num_bytes is not None:
            what = "end of the answer"
        behind = "" if wait.num_bytes is None else f", after {wait.num_bytes} bytes"
        why = "" if self._patience.seconds is None else ", and a signal has asked the run to end"
        return f"no {what} within {self._timeout_s(wait):g} s{behind}{why}"

    def _may_look(self, wait: _Wait) -> bool:
        """Return whether a growing count of tokens would be news of a request: it waits for the first byte for long."""
        heard = max(wait.since, self._last_sign, self._looked)
        is_due = time.monotonic() - heard >= self._timeout_s(wait) / _LOOKS
        return wait.generates and wait.num_bytes is None and is_due

    async def _look(self, timeout_s: float) -> None:
        """Note a sign of life if the server's count of tokens has grown since the last look."""
        try:
            answer = await self.answer("GET", METRICS, timeout_s=timeout_s, is_sign=False)
            num_tokens = counted_tokens(answer, self.address)
        except EngineError:
            self._looked = time.monotonic()  # no sign of life: the requests that wait time out
            return
        self._looked = time.monotonic()
        if num_tokens != self._num_tokens:
            self._num_tokens, self._last_sign = num_tokens, self._looked
            self._alive()


def counted_tokens(answer: HttpAnswer, address: str) -> float | None:
    """Return the tokens that a server has read and generated since its start, from its answer to `METRICS`.

    The result is None if the server keeps no count.  Raises: `EngineError` for a count that is no number.
    """
    counts = _TOKENS.findall(answer.text) if answer.status == 200 else []
    try:
        return sum(map(float, counts)) if counts else None
    except ValueError as error:
        raise EngineError(f"{address}: expected numbers of tokens from {METRICS}: {error}") from error
