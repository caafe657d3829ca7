# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The vLLM servers of a run over HTTP; the process of http/ speaks HTTP and reads the responses.

`VllmServer` is one server, `on_each` works on several at once, and `ServerPool` knows which of them have which weights
and which have failed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Concatenate, ParamSpec, TypeVar

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.vllm.coroutines import Work, begin, run
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.http.http_tasks import ServerAccess
from megatron_selfdistill.rollout.vllm.http.response_answer import RequestRefused as RequestRefused
from megatron_selfdistill.rollout.vllm.server_calls import ServerCalls

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_keys = itertools.count()
_PROBE_SECONDS = 10.0
_GRACE_SECONDS = 5.0


def _waiting(call: Callable[Concatenate[ServerCalls, P], Work[T]]) -> Callable[Concatenate[VllmServer, P], T]:
    """Return the method that makes ``call`` and returns its result when it has ended."""

    @functools.wraps(call)
    def method(server: VllmServer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(call(server.calls, *args, **kwargs))

    return method


class VllmServer:
    """The server at ``address`` (``http://host:port``); ``token`` is sent with every request unless it is empty.

    Any number of threads may use it at once.  A method waits for the server's answer in the thread that calls it; work
    on many servers at once uses `calls`.  Errors are those of `ServerCalls`.
    """

    def __init__(
        self,
        address: str,
        token: str = "",
        timeout_s: float = 1200.0,
        *,
        vocab_size: int | None = None,
        adapted: bool = False,
    ) -> None:
        """Make a client of the server.

        ``vocab_size``: number of the model's tokens, without which the client generates nothing.  ``adapted``: whether
        the run has adapters, which the server then takes.
        """
        self.address = address.rstrip("/")
        self._access = ServerAccess(next(_keys), self.address, token, timeout_s)
        self.calls = ServerCalls(self._access, vocab_size=vocab_size, adapted=adapted)
        """The calls of the server, as coroutines."""
        self._url = urllib.parse.urlsplit(self.address)

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"  # without the token

    @property
    def name(self) -> str:
        """The name of the server in messages, with its address."""
        return self.calls.name

    @property
    def host(self) -> str:
        """Name or number of the server's host, without the port."""
        return self._url.hostname or ""

    @property
    def port(self) -> int:
        """Port of the server, by default that of the scheme."""
        return self._url.port or (443 if self._url.scheme == "https" else 80)

    def begin(self, request: EngineRequest, convert: Callable[[EngineOutput], T]) -> Future[T]:
        """Send a request and return ``convert`` of its output to come; see `ServerCalls.begin`."""
        return self.calls.begin(request, convert)

    def interrupt(self) -> None:
        """Let every request that is under way raise `EngineError`; the server drops the request."""
        self.calls.interrupt()

    described = _waiting(ServerCalls.described)
    health = _waiting(ServerCalls.health)
    weight_version = _waiting(ServerCalls.weight_version)
    world_size = _waiting(ServerCalls.world_size)
    workers = _waiting(ServerCalls.workers)
    max_model_len = _waiting(ServerCalls.max_model_len)
    num_tokens = _waiting(ServerCalls.num_tokens)
    update_weights = _waiting(ServerCalls.update_weights)


Failures = dict[VllmServer, Exception]


def on_each(servers: Sequence[VllmServer], do: Callable[[VllmServer], Work[None]]) -> Failures:
    """Run ``do`` for all servers at once; return the exception of each server on which it failed."""
    return on_each_while(None, servers, do)


def on_each_while(
    own: Callable[[], None] | None, servers: Sequence[VllmServer], do: Callable[[VllmServer], Work[None]]
) -> Failures:
    """Run ``do`` for all servers at once and call ``own`` meanwhile in this thread; return the failures.

    A failure of ``own`` alone counts as a failure of every server: it does not show which of them caused it.  A server
    that has not answered some seconds after ``own`` failed is interrupted, and fails.  No server takes a thread.
    """
    answers: dict[VllmServer, Future[None]] = {}
    own_error: Exception | None = None
    try:
        for server in servers:
            answers[server] = begin(do(server))
        own_error = _error_of(own) if own is not None and servers else None
        if own_error is not None:
            silent = wait(answers.values(), _GRACE_SECONDS).not_done
            for server in [server for server, answer in answers.items() if answer in silent]:
                server.interrupt()
    finally:
        wait(answers.values())  # servers may read the memory of a bucket until they have answered
    raised = {server: answer.exception() for server, answer in answers.items()}
    # Without their tracebacks, whose frames would keep the memory of a bucket for as long as the failure is known.
    failures: Failures = {
        server: error.with_traceback(None) for server, error in raised.items() if isinstance(error, Exception)
    }
    if own_error is not None and not failures:
        return {server: EngineError(f"{server.address}: {own_error}") for server in servers}
    return failures


def _error_of(own: Callable[[], None]) -> Exception | None:
    try:
        own()
    except Exception as error:
        return error
    return None


class ServerPool:
    """The servers as rank 0 knows them.

    A server that fails gets no request until weights have been sent to it again, or until it answers with the weights
    that it had.
    """

    def __init__(self, servers: Sequence[VllmServer]) -> None:
        self.servers = list(servers)
        self._versions: dict[VllmServer, int] = {}  # of the complete weights that a server is known to have
        self._failed: dict[VllmServer, Exception] = {}

    @property
    def num_alive(self) -> int:
        """Number of the servers that have not failed."""
        return len(self.servers) - len(self._failed)

    def reachable(self, forget: Callable[[VllmServer], None]) -> list[VllmServer]:
        """Return the servers that answer now.

        ``forget`` is called for each server that has lost the weights that it had received.

        Raises: `EngineError` if no server answers.
        """
        reported: dict[VllmServer, str] = {}

        async def ask(server: VllmServer) -> None:
            await server.calls.health(_PROBE_SECONDS)
            reported[server] = await server.calls.weight_version(_PROBE_SECONDS)

        failures = on_each(self.servers, ask)
        self.lose(failures)
        for server, version in reported.items():
            if version != str(self._versions.get(server)):
                forget(server)
                self._versions.pop(server, None)
        if not reported:
            raise EngineError(f"no vLLM server can be reached: {_causes(failures.values())}")
        return [server for server in self.servers if server in reported]

    def begin_update(self, servers: Iterable[VllmServer]) -> None:
        """Note that the weights of ``servers`` are incomplete from now on."""
        for server in servers:
            self._versions.pop(server, None)

    def finish_update(self, servers: Iterable[VllmServer], version: int) -> None:
        """Note that ``servers`` have the complete weights of ``version``, and thus no longer count as failed."""
        for server in servers:
            self._versions[server] = version
            self._failed.pop(server, None)

    def lose(self, failures: Mapping[VllmServer, Exception]) -> None:
        """Note the servers that have failed, with their errors; warn of each new failure."""
        for server, error in failures.items():
            if server not in self._failed:
                logger.warning("lost a vLLM server: %s", error)
            self._failed[server] = error

    def require(self, version: int) -> None:
        """Raise `EngineError` if no server has the weights of ``version``."""
        if version not in self._versions.values():
            raise EngineError(f"no vLLM server took the weights: {_causes(self._failed.values())}")

    def usable(self, version: int, max_staleness: int) -> list[VllmServer]:
        """Return the servers whose weights are at most ``max_staleness`` steps older than ``version``.

        A failed server that may have such weights is asked for the version of its weights.

        Raises: `EngineError` if there is no such server.
        """

        async def ask(server: VllmServer) -> None:
            if await server.calls.weight_version(_PROBE_SECONDS) != str(self._versions[server]):
                raise EngineError(f"{server.address}: lost its weights")

        def is_recent(server: VllmServer) -> bool:
            own = self._versions.get(server)
            return own is not None and 0 <= version - own <= max_staleness

        candidates = [server for server in self._failed if server in self._versions]
        still_failing = on_each(candidates, ask)
        for server in candidates:
            if server not in still_failing:
                self._failed.pop(server, None)
        usable = [server for server in self.servers if server not in self._failed and is_recent(server)]
        if not usable:
            raise EngineError(
                f"none of {len(self.servers)} vLLM servers is alive and has weights of version {version}: "
                f"{_causes(self._failed.values())}"
            )
        return usable


def failing(servers: Sequence[VllmServer]) -> dict[VllmServer, Exception]:
    """Return the servers that do not answer now, with their errors."""
    return on_each(servers, lambda server: server.calls.health(_PROBE_SECONDS))


def _causes(errors: Iterable[Exception]) -> str:
    return "; ".join(str(error) for error in list(errors)[:4])
