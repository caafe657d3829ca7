# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The vLLM servers of a run: work on several at once, and which of them have which weights and which have failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait

from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import Work, begin
from megatron_selfdistill.errors import EngineError, first_few

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
"""Seconds in which a server answers that is asked whether it is alive."""

_GRACE_SECONDS = 5.0

Failures = dict[VllmServer, Exception]


def on_each(
    servers: Sequence[VllmServer], do: Callable[[VllmServer], Work[None]], own: Callable[[], None] | None = None
) -> Failures:
    """Run ``do`` for all servers at once; return the exception of each server on which it failed.

    ``own``: what this thread calls meanwhile.  A failure of ``own`` alone counts as a failure of every server: it does
    not show which of them caused it.  A server that has not answered some seconds after ``own`` failed is interrupted,
    and fails.  No server takes a thread.
    """
    answers: dict[VllmServer, Future[None]] = {}
    own_error: Exception | None = None
    try:
        for server in servers:
            answers[server] = begin(do(server))
        if own is not None and servers:
            own()
    except Exception as error:
        own_error = error
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
            await server.health(PROBE_SECONDS)
            reported[server] = await server.weight_version(PROBE_SECONDS)

        failures = on_each(self.servers, ask)
        self.lose(failures)
        for server, version in reported.items():
            if version != str(self._versions.get(server)):
                forget(server)
                self._versions.pop(server, None)
        if not reported:
            raise EngineError(f"no vLLM server can be reached: {_causes(failures)}")
        return [server for server in self.servers if server in reported]

    def has_weights(self, server: VllmServer) -> bool:
        """Return whether ``server`` is known to have complete weights of this run, of any version."""
        return server in self._versions

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
            raise EngineError(f"no vLLM server took the weights: {_causes(self._failed)}")

    def usable(self, version: int, max_staleness: int) -> list[VllmServer]:
        """Return the servers whose weights are at most ``max_staleness`` steps older than ``version``.

        A failed server that may have such weights is asked for the version of its weights.

        Raises: `EngineError` if there is no such server.
        """

        async def ask(server: VllmServer) -> None:
            if await server.weight_version(PROBE_SECONDS) != str(self._versions[server]):
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
            raise EngineError(f"no vLLM server is alive and has weights of version {version}: {_causes(self._failed)}")
        return usable


def _causes(failures: Failures) -> str:
    return first_few([str(error) for error in failures.values()])
