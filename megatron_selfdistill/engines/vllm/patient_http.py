# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""HTTP requests to one vLLM server that wait as long as the server shows signs of life."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

from megatron_selfdistill.distributed import stop
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.distributed.timed_http import HttpAnswer, HttpError, exchange, new_client
from megatron_selfdistill.errors import EngineError

METRICS = "/metrics"
"""The path at which a server states its counts."""

# The greatest length of an answer unless the caller states another one: the longest are results of all workers.
_MAX_BYTES = 2**27
# The patience with a silent server once a signal has asked the run to end: the same signal may have ended the server,
# and the run needs the rest of its time for a checkpoint.
_LEAVING_SECONDS = 15.0
_TICK_SECONDS = 1.0
_LOOKS = 4  # the number of times per timeout that a silent server must state its token count
_GIVEN_UP = "given up, since another request failed or the sampler was closed"
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass(eq=False)
class _Wait:
    timeout_s: float
    generates: bool
    deadline: asyncio.Timeout
    since: float = field(default_factory=time.monotonic)
    given_up: bool = False
    """Whether nobody needs the answer any more."""


class PatientHttp:
    """The requests of this process to the server at ``address``, with ``token`` unless it is empty.

    Any number of tasks may use the object at once.  No connection, silence, and an answer that is too long are an
    `EngineError` with the address and the cause.  An answer must be complete after ``timeout_s``.  The time that a
    response takes is unknown, so its time starts again with each answer of the server, and whenever the server's count
    of tokens has grown.  After a signal that asks the run to end, a shorter time is enough.
    """

    def __init__(self, address: str, token: str, timeout_s: float) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._client = new_client(address)
        self._headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}".encode()
        self._waits: set[_Wait] = set()
        self._watching: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._last_sign = self._looked = 0.0
        self._signalled: float | None = None  # the time at which a signal to end was seen
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
    ) -> HttpAnswer:
        """Return an answer.

        ``generates``: whether the server generates tokens for the request.  ``max_bytes``: the greatest length of the
        answer.
        """
        deadline = asyncio.timeout(None)
        wait = _Wait(self.timeout_s if timeout_s is None else timeout_s, generates, deadline)
        self._waits.add(wait)
        try:
            async with deadline:
                if self._watching is None or self._watching.done():  # one task watches for all requests
                    self._watching = asyncio.create_task(self._watch())
                answer = await exchange(self._client, method, self.address + path, content, self._headers, max_bytes)
        except TimeoutError:
            why = f"TimeoutError: no {'token' if generates else 'answer'} within {self._timeout_s(wait):g} s"
            why += "" if self._signalled is None else ", and a signal has asked the run to end"
            raise EngineError(f"{self.address}: {method} {path}: {_GIVEN_UP if wait.given_up else why}") from None
        except HttpError as error:
            raise EngineError(f"{self.address}: {method} {path}: {error}") from error
        finally:
            self._waits.discard(wait)
        self._last_sign = time.monotonic()
        return answer

    async def interrupt(self) -> None:
        """Let every request that is under way raise `EngineError`; the server drops the request."""
        for wait in self._waits:
            wait.given_up = True
            wait.deadline.reschedule(asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        """End the requests whose time is over, while there are requests."""
        while self._waits:
            pause_s = min(self._timeout_s(wait) / _LOOKS for wait in self._waits)
            await asyncio.sleep(min(pause_s, _TICK_SECONDS))
            if not stop.asked():
                self._signalled = None
            elif self._signalled is None:
                self._signalled = time.monotonic()
            silent_s = time.monotonic() - max(self._last_sign, self._looked)
            looks = any(wait.generates and silent_s >= self._timeout_s(wait) / _LOOKS for wait in self._waits)
            if looks and (self._looking is None or self._looking.done()):
                self._looking = asyncio.create_task(self._look())
            for wait in [wait for wait in self._waits if self._left(wait) <= 0]:
                wait.deadline.reschedule(asyncio.get_running_loop().time())
                self._waits.discard(wait)

    def _left(self, wait: _Wait) -> float:
        """Return the seconds that are left to a request; a sign of life starts the time of a response again."""
        since = max(wait.since, self._last_sign if wait.generates else 0.0, self._signalled or 0.0)
        return since + self._timeout_s(wait) - time.monotonic()

    def _timeout_s(self, wait: _Wait) -> float:
        return wait.timeout_s if self._signalled is None else min(wait.timeout_s, _LEAVING_SECONDS)

    async def _look(self) -> None:
        """Note a sign of life if the server's count of tokens has grown since the last look."""
        try:
            async with asyncio.timeout(self.timeout_s):
                url = self.address + METRICS
                answer = await exchange(self._client, "GET", url, None, self._headers, _MAX_BYTES)
                num_tokens = counted_tokens(answer, self.address)
        except (HttpError, TimeoutError, EngineError):
            num_tokens = self._num_tokens  # no sign of life: the requests that wait time out
        self._looked = time.monotonic()
        if num_tokens != self._num_tokens:
            self._num_tokens, self._last_sign = num_tokens, self._looked
            beat()


def counted_tokens(answer: HttpAnswer, address: str) -> float | None:
    """Return the tokens that a server has read and generated since its start, from its answer to `METRICS`.

    The result is None if the server keeps no count.  Raises: `EngineError` for a count that is no number.
    """
    counts = _TOKENS.findall(answer.text) if answer.status == 200 else []
    try:
        return sum(map(float, counts)) if counts else None
    except ValueError as error:
        raise EngineError(f"{address}: expected numbers of tokens from {METRICS}: {error}") from error
