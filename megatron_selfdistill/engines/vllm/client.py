# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM server over HTTP; every method that asks the server is a coroutine for `coroutines.begin`."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.engines.vllm.coroutines import begin
from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_NAME
from megatron_selfdistill.engines.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.engines.vllm.http.patient_http import METRICS, PatientHttp, counted_tokens
from megatron_selfdistill.engines.vllm.http.response_answer import ACCEPTED, max_bytes_of, parsed, response_in, shown
from megatron_selfdistill.engines.vllm.http.stated_response import GENERATE
from megatron_selfdistill.errors import EngineError


class VllmServer:
    """The server at ``address`` (``http://host:port``); ``token`` is sent with every request unless it is empty.

    Any number of threads may use it at once.  Every failure is an `EngineError` with the address and the cause: no
    connection, an answer of another form, an answer that cannot be true (`possible_output`), an error of the server,
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
        self._url = urllib.parse.urlsplit(self.address)

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"  # without the token

    @property
    def name(self) -> str:
        """The name of the server in messages, with its address."""
        return f"the vLLM server {self.address}"

    @property
    def host(self) -> str:
        """Name or number of the server's host, without the port."""
        return self._url.hostname or ""

    @property
    def port(self) -> int:
        """Port of the server, by default that of the scheme."""
        return self._url.port or (443 if self._url.scheme == "https" else 80)

    def interrupt(self) -> None:
        """Let every request that is under way raise `EngineError`; the server drops the request."""
        begin(self._http.interrupt())

    async def generate(self, request: EngineRequest) -> EngineOutput:
        """Return the server's response to a request; raise `RequestRefused` where any server would refuse it."""
        assert self._vocab_size is not None, "a client that generates needs vocab_size"
        body = {"token_ids": request.token_ids, "sampling_params": dict(request.sampling), "stream": False}
        if self._model is not None:
            body["model"] = self._model
        content, max_bytes = json.dumps(body).encode(), max_bytes_of(request)
        answer = await self._http.answer(
            "POST", GENERATE, content, generates=True, max_bytes=max_bytes, accept=ACCEPTED
        )
        return response_in(answer, request, self.address, self._vocab_size)

    async def call(self, method: str, *args: Any) -> Any:
        """Call the worker extension's method of that name, and return the result of the server's first worker."""
        return (await self.call_all(method, *args))[0]

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call the worker extension's method of that name; return the result of each worker, by rank."""
        answer = await self._ask("POST", "/collective_rpc", {"method": method, "args": list(args)})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results:
            raise self._error(f"expected a result of {method} from each worker, got {shown(answer)}")
        return results

    async def described(self, method: str, *args: Any, **kinds: Any) -> list[dict[str, Any]]:
        """Return the results of `call_all`, which are objects with entries of these ``kinds``."""
        results = await self.call_all(method, *args)
        for result in results:
            if not isinstance(result, dict) or not all(isinstance(result.get(key), kinds[key]) for key in kinds):
                raise self._error(f"expected {', '.join(kinds)} from {method}, got {shown(result)}")
        return results

    async def health(self, timeout_s: float | None = None) -> None:
        """Return if the server is up and its engine alive, else raise `EngineError`."""
        await self._ask("GET", "/health", timeout_s=timeout_s)

    async def weight_version(self, timeout_s: float | None = None) -> str:
        """Return the version that `finish_weight_update` or `set_weight_version` set last.

        Before the first of these calls the version may be any word.
        """
        return str(await self._field("/weight_info", "weight_version", str | int | None, timeout_s))

    async def world_size(self) -> int:
        """Return the number of this server's workers."""
        size: int = await self._field("/get_world_size", "world_size", int)
        return size

    async def workers(self) -> list[dict[str, Any]]:
        """Return a dictionary for each worker of this server, in the order of their ranks.

        ``host`` is the name of the worker's host and ``boot_id`` the id of the host's running kernel; ``address`` is
        the worker's address among the server's nodes, empty where the server has one node; ``nccl`` is the version of
        its NCCL library, None on a CPU; ``gpus`` are the UUIDs of the GPUs that it sees and ``gpu``
        is that of the GPU on which it computes, None on a CPU.
        """
        text = str | None
        return await self.described("place", host=str, boot_id=str, address=str, nccl=text, gpus=list, gpu=text)

    async def max_model_len(self) -> int | None:
        """Return the greatest length of prompt plus response in tokens; None if the server does not report it."""
        models = await self._field("/v1/models", "data", list)
        longest = models[0].get("max_model_len") if models and isinstance(models[0], dict) else None
        if not isinstance(longest, int | None) or any(not isinstance(model, dict) for model in models):
            raise self._error(f"expected models with a number max_model_len from /v1/models, got {shown(models)}")
        return longest

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
        answer = await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true", {})
        if not (isinstance(answer, dict) and answer.get("success")):
            raise self._error("cannot reset its prefix cache: blocks are still in use")

    async def resume(self) -> None:
        """Let the server work on requests again."""
        await self._ask("POST", "/resume", {})

    async def _field(self, path: str, name: str, kind: Any, timeout_s: float | None = None) -> Any:
        answer = await self._ask("GET", path, timeout_s=timeout_s)
        if not isinstance(answer, dict) or name not in answer or not isinstance(answer[name], kind):
            raise self._error(f"expected {name} from {path}, got {shown(answer)}")
        return answer[name]

    async def _ask(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        answer = await self._http.answer(method, path, content, timeout_s=timeout_s)
        return parsed(answer, method, path, self.address)

    def _error(self, message: str) -> EngineError:
        return EngineError(f"{self.address}: {message}")
