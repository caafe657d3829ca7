# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM server over HTTP; every method that asks the server is a coroutine for `coroutines.begin`."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megatron_selfdistill.engines.vllm.coroutines import begin
from megatron_selfdistill.engines.vllm.engine import EngineRequest, possible_response, stated_in_json
from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_NAME
from megatron_selfdistill.engines.vllm.patient_http import METRICS, PatientHttp, counted_tokens
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Response

_GENERATE = "/inference/v1/generate"
_SHOWN_CHARS = 500
# The greatest length of an answer with a response: that of its fixed parts, and that of a token, which needs 200 bytes.
_FIXED_BYTES, _TOKEN_BYTES = 2**20, 2**10

T = TypeVar("T")


class RequestRefused(EngineError):
    """The server refuses the request; another server would refuse it too."""


class VllmServer:
    """The server at ``address`` (``http://host:port``); ``token`` is sent with every request unless it is empty.

    Any number of threads may use it at once.  Every failure is an `EngineError` with the address and the cause: no
    connection, an answer of another form, an answer that cannot be true (`possible_response`), an error of the server,
    and silence (`PatientHttp`).
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

        ``timeout_s``: seconds after which a silent server counts as dead.  ``vocab_size``: number of the model's
        tokens, without which the client generates nothing.  ``adapted``: whether the run has adapters, which the server
        then takes.
        """
        self.address = address.rstrip("/")
        self._http = PatientHttp(self.address, token, timeout_s)
        self._vocab_size, self._model = vocab_size, ADAPTER_NAME if adapted else None
        url = urllib.parse.urlsplit(self.address)
        self.place = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        """Name or number of the server's host, and its port."""

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"  # without the token

    @property
    def name(self) -> str:
        """The name of the server in messages, with its address."""
        return f"the vLLM server {self.address}"

    def interrupt(self) -> None:
        """Let every request that is under way raise `EngineError`; the server drops the request."""
        begin(self._http.interrupt())

    async def generate(self, request: EngineRequest) -> Response:
        """Return the server's response to a request.

        Raises: `EngineError` if a part of the response is missing, wrong or impossible; `RequestRefused` where any
        server would refuse the request.
        """
        vocab_size = self._vocab_size
        assert vocab_size is not None, "a client that generates needs vocab_size"
        body = {"token_ids": request.token_ids, "sampling_params": dict(request.sampling), "stream": False}
        if self._model is not None:
            body["model"] = self._model
        max_bytes = _FIXED_BYTES + _TOKEN_BYTES * int(request.sampling.get("max_tokens", 0))

        def read(answer: Any) -> Response:
            return possible_response(request, stated_in_json(answer), vocab_size, self.name)

        return await self._ask("POST", _GENERATE, body, read, generates=True, max_bytes=max_bytes)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call the worker extension's method of that name; return the result of each worker, by rank."""
        body = {"method": method, "args": list(args)}
        return await self._ask("POST", "/collective_rpc", body, lambda answer: list(answer["results"]))

    async def health(self, timeout_s: float | None = None) -> None:
        """Return if the server is up and its engine alive, else raise `EngineError`."""
        await self._ask("GET", "/health", timeout_s=timeout_s)

    async def weight_version(self, timeout_s: float | None = None) -> str:
        """Return the version that `finish_weight_update` or `set_weight_version` set last.

        Before the first of these calls the version may be any word.
        """
        path = "/weight_info"
        return await self._ask("GET", path, read=lambda answer: str(answer["weight_version"]), timeout_s=timeout_s)

    async def world_size(self) -> int:
        """Return the number of this server's workers."""
        return await self._ask("GET", "/get_world_size", read=lambda answer: int(answer["world_size"]))

    async def workers(self) -> list[dict[str, Any]]:
        """Return a dictionary for each worker of this server, in the order of their ranks.

        ``host`` is the name of the worker's host and ``boot_id`` the id of the host's running kernel; ``address`` is
        the worker's address among the server's nodes, empty where the server has one node; ``nccl`` is the version of
        its NCCL library, and ``gpu`` the UUID of the GPU on which it computes; both are None on a CPU.
        """
        return await self.call_all("place")

    async def max_model_len(self) -> int | None:
        """Return the greatest length of prompt plus response in tokens; None if the server does not report it."""
        longest = await self._ask("GET", "/v1/models", read=lambda answer: answer["data"][0].get("max_model_len"))
        return None if longest is None else int(longest)

    async def num_tokens(self, timeout_s: float | None = None) -> float | None:
        """Return the tokens that the server has read and generated since its start; None if it keeps no count."""
        return counted_tokens(await self._http.answer("GET", METRICS, timeout_s=timeout_s), self.address)

    # The calls of one weight update, in order.

    async def pause(self, *, keeps: bool = False) -> None:
        """Stop all work until `resume`.

        ``keeps``: requests that still run, and requests that come meanwhile, go on after `resume`; otherwise those that
        still run, of a trainer that has ended, are aborted.
        """
        await self._ask("POST", "/pause?mode=keep&clear_cache=false" if keeps else "/pause?mode=abort", {})

    async def init_weight_transfer(self, transfer: str, arguments: Mapping[str, Any]) -> None:
        """Set the transfer of the coming weights (engines/vllm/plugin/receivers.py), first or after a change."""
        info = {"transfer": transfer, "arguments": dict(arguments)}
        await self._ask("POST", "/init_weight_transfer_engine", {"init_info": info})

    async def set_weight_version(self, version: str) -> None:
        """Set the version that the server reports with responses from now on."""
        await self._ask("POST", "/update_weight_version", {"new_version": version})

    async def start_weight_update(self) -> None:
        """Begin an update: the following buckets replace all weights."""
        await self._ask("POST", "/start_weight_update", {})

    async def update_weights(self, /, **update_info: Any) -> None:
        """Load one bucket of weights; return when it is loaded."""
        await self._ask("POST", "/update_weights", {"update_info": update_info})

    async def finish_weight_update(self, version: str) -> None:
        """End an update in which all weights have arrived, and clear the caches of the old weights.

        Requests that a pause has kept read their tokens again when they go on, so that each further token has the
        distribution that the new weights alone give it.
        """
        await self._ask("POST", "/finish_weight_update", {"weight_version": version})
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not await self._ask("POST", path, {}, lambda answer: answer["success"]):
            raise EngineError(f"{self.address}: cannot reset its prefix cache: blocks are still in use")

    async def resume(self) -> None:
        """Let the server work on requests again."""
        await self._ask("POST", "/resume", {})

    async def _ask(
        self, method: str, path: str, body: Any = None, read: Callable[[Any], T] = lambda answer: answer, **options: Any
    ) -> T:
        """Send a request and return what ``read`` finds in the JSON of its answer, None in an empty one.

        ``options``: those of `PatientHttp.answer`.
        Raises: `EngineError` for a refusal, and for an answer of another form.
        """
        content = None if body is None else json.dumps(body).encode()
        answer = await self._http.answer(method, path, content, **options)
        if answer.status != 200:
            kind = RequestRefused if 400 <= answer.status < 500 else EngineError
            raise kind(f"{self.address}: {method} {path} answered {answer.status}: {_reason(answer.text)}")
        try:
            return read(json.loads(answer.text) if answer.text.strip() else None)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise EngineError(
                f"{self.address}: {method} {path}: expected an answer of another form, got {_shown(answer.text)} "
                f"({why})"
            ) from error


def _shown(text: str) -> str:
    return text[:_SHOWN_CHARS] + ("..." if len(text) > _SHOWN_CHARS else "")


def _reason(text: str) -> str:
    """Return the message in an answer that reports an error, without the JSON around it."""
    try:
        return _shown(str(json.loads(text)["error"]["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return _shown(text)
