# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM server over HTTP; the process of http/ speaks HTTP and reads the responses."""

from __future__ import annotations

import functools
import itertools
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import Concatenate, ParamSpec, TypeVar

from megatron_selfdistill.rollout.vllm.coroutines import Work, run
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.http.http_tasks import ServerAccess
from megatron_selfdistill.rollout.vllm.http.response_answer import RequestRefused as RequestRefused
from megatron_selfdistill.rollout.vllm.server_calls import ServerCalls

P = ParamSpec("P")
T = TypeVar("T")

_keys = itertools.count()


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

    generate = _waiting(ServerCalls.generate)
    call = _waiting(ServerCalls.call)
    described = _waiting(ServerCalls.described)
    health = _waiting(ServerCalls.health)
    weight_version = _waiting(ServerCalls.weight_version)
    world_size = _waiting(ServerCalls.world_size)
    workers = _waiting(ServerCalls.workers)
    max_model_len = _waiting(ServerCalls.max_model_len)
    num_tokens = _waiting(ServerCalls.num_tokens)
    update_weights = _waiting(ServerCalls.update_weights)
