# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM server over HTTP, as an `Engine`, with the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.vllm.engine import EngineOutput, EngineRequest, possible_output
from megatron_selfdistill.rollout.vllm.engine_adapter import ADAPTER_NAME
from megatron_selfdistill.rollout.vllm.patient_http import PatientHttp

MAX_IN_FLIGHT = 512
"""Number of requests that one server works on at once; further requests wait here."""

_SHOWN_CHARS = 500
# The greatest length of an answer with a response: that of its fixed parts, and that of a token, which needs 200 bytes.
_FIXED_BYTES, _TOKEN_BYTES = 2**20, 2**10


class RequestRefused(EngineError):
    """The server refuses the request; another server would refuse it too."""


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

        ``vocab_size``: number of the model's tokens, without which the client generates nothing.  ``adapted``: whether
        the run has adapters, which the server then takes.
        """
        self.address, self._vocab_size, self._adapted = address.rstrip("/"), vocab_size, adapted
        self._http = PatientHttp(self.address, token, timeout_s)

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"  # without the token

    @property
    def name(self) -> str:
        """The name of the server in messages, with its address."""
        return f"the vLLM server {self.address}"

    @property
    def host(self) -> str:
        """Name or number of the server's host, without the port."""
        return self._http.host

    @property
    def port(self) -> int:
        """Port of the server, by default that of the scheme."""
        return self._http.port

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        """Return one output per request, in order.

        Up to `MAX_IN_FLIGHT` requests are at the server at once, neighbours together.  Raises `EngineError`, with
        nothing returned, if one fails.
        """
        if not requests:
            return []
        with ThreadPoolExecutor(min(len(requests), MAX_IN_FLIGHT), thread_name_prefix="request") as threads:
            try:
                return list(threads.map(self.complete, requests))
            except BaseException:
                self.interrupt()
                raise

    def complete(self, request: EngineRequest) -> EngineOutput:
        """Return the output of one request."""
        body: dict[str, Any] = {
            "token_ids": request.token_ids,
            "sampling_params": dict(request.sampling),
            "stream": False,
        }
        if self._adapted and request.adapted:
            body["model"] = ADAPTER_NAME
        longest = request.sampling.get("max_tokens", 0)
        longest += len(request.token_ids) if "prompt_logprobs" in request.sampling else 0
        max_bytes = _FIXED_BYTES + _TOKEN_BYTES * longest
        status, text = self._http.answer("POST", "/inference/v1/generate", body, generates=True, max_bytes=max_bytes)
        return self._output(self._parsed("POST", "/inference/v1/generate", status, text), request)

    def call(self, method: str, *args: Any) -> Any:
        """Call the worker extension's method of that name, and return the result of the server's first worker."""
        return self.call_all(method, *args)[0]

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call the worker extension's method of that name; return the result of each worker, by rank."""
        answer = self._ask("POST", "/collective_rpc", {"method": method, "args": list(args)})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results:
            raise self._error(f"expected a result of {method} from each worker, got {_shown(answer)}")
        return results

    def described(self, method: str, *args: Any, **kinds: Any) -> list[dict[str, Any]]:
        """Return the results of `call_all`, which are objects with entries of these ``kinds``."""
        results = self.call_all(method, *args)
        for result in results:
            if not isinstance(result, dict) or not all(isinstance(result.get(key), kinds[key]) for key in kinds):
                raise self._error(f"expected {', '.join(kinds)} from {method}, got {_shown(result)}")
        return results

    def interrupt(self) -> None:
        """Let every request that waits in another thread raise `EngineError`; the server drops the request."""
        self._http.interrupt()

    def health(self, timeout_s: float | None = None) -> None:
        """Return if the server is up and its engine alive, else raise `EngineError`."""
        self._ask("GET", "/health", timeout_s=timeout_s)

    def weight_version(self, timeout_s: float | None = None) -> str:
        """Return the version that `finish_weight_update` or `set_weight_version` set last.

        Before the first of these calls the version may be any word.
        """
        return str(self._field("/weight_info", "weight_version", str | int | None, timeout_s))

    def world_size(self) -> int:
        """Return the number of this server's workers."""
        size: int = self._field("/get_world_size", "world_size", int)
        return size

    def workers(self) -> list[dict[str, Any]]:
        """Return a dictionary for each worker of this server, in the order of their ranks.

        ``host`` is the name of the worker's host and ``boot_id`` the id of the host's running kernel; ``address`` is
        the worker's address among the server's nodes, empty where the server has one node; ``nccl`` is the version of
        its NCCL library, None on a CPU; ``gpus`` are the UUIDs of the GPUs that it sees and ``gpu``
        is that of the GPU on which it computes, None on a CPU.
        """
        text = str | None
        return self.described("place", host=str, boot_id=str, address=str, nccl=text, gpus=list, gpu=text)

    def max_model_len(self) -> int | None:
        """Return the greatest length of prompt plus response in tokens; None if the server does not report it."""
        models = self._field("/v1/models", "data", list)
        longest = models[0].get("max_model_len") if models and isinstance(models[0], dict) else None
        if not isinstance(longest, int | None) or any(not isinstance(model, dict) for model in models):
            raise self._error(f"expected models with a number max_model_len from /v1/models, got {_shown(models)}")
        return longest

    def num_tokens(self, timeout_s: float | None = None) -> float | None:
        """Return the tokens that the server has read and generated since its start; None where it keeps no count."""
        return self._http.num_tokens(timeout_s)

    # The calls of one weight update, in order.

    def pause(self, *, keeps: bool = False) -> None:
        """Stop all work until `resume`.

        ``keeps``: requests that still run, and requests that come meanwhile, go on after `resume`; otherwise those that
        still run, of a trainer that has ended, are aborted.
        """
        self._ask("POST", "/pause?mode=keep&clear_cache=false" if keeps else "/pause?mode=abort", {})

    def init_weight_transfer(self, transfer: str, arguments: Mapping[str, Any]) -> None:
        """Set the transfer of the coming weights (rollout/vllm/plugin/receivers.py), first or after a change."""
        info = {"transfer": transfer, "arguments": dict(arguments)}
        self._ask("POST", "/init_weight_transfer_engine", {"init_info": info})

    def set_weight_version(self, version: str) -> None:
        """Set the version that the server reports with responses from now on."""
        self._ask("POST", "/update_weight_version", {"new_version": version})

    def start_weight_update(self) -> None:
        """Begin an update: the following buckets replace all weights."""
        self._ask("POST", "/start_weight_update", {})

    def update_weights(self, **update_info: Any) -> None:
        """Load one bucket of weights; return when it is loaded."""
        self._ask("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, version: str) -> None:
        """End an update in which all weights have arrived, and clear the caches of the old weights.

        Requests that a pause has kept read their tokens again when they go on, so that each further token has the
        distribution that the new weights alone give it.
        """
        self._ask("POST", "/finish_weight_update", {"weight_version": version})
        answer = self._ask("POST", "/reset_prefix_cache?reset_running_requests=true", {})
        if not (isinstance(answer, dict) and answer.get("success")):
            raise self._error("cannot reset its prefix cache: blocks are still in use")

    def resume(self) -> None:
        """Let the server work on requests again."""
        self._ask("POST", "/resume", {})

    def _field(self, path: str, name: str, kind: Any, timeout_s: float | None = None) -> Any:
        answer = self._ask("GET", path, timeout_s=timeout_s)
        if not isinstance(answer, dict) or name not in answer or not isinstance(answer[name], kind):
            raise self._error(f"expected {name} from {path}, got {_shown(answer)}")
        return answer[name]

    def _ask(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        return self._parsed(method, path, *self._http.answer(method, path, body, timeout_s))

    def _parsed(self, method: str, path: str, status: int, text: str) -> Any:
        """Return an answer, or None where it is empty; raise `EngineError` for a refusal, and for no JSON."""
        if status != 200:
            kind = RequestRefused if 400 <= status < 500 else EngineError
            raise kind(f"{self.address}: {method} {path} answered {status}: {_reason(text)}")
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise self._error(f"{method} {path}: expected JSON, got {_shown(text)}") from error

    def _output(self, answer: Any, request: EngineRequest) -> EngineOutput:
        """Return the output that an answer holds; raise `EngineError` if a part of it is missing or wrong."""
        assert self._vocab_size is not None, "a client that generates needs vocab_size"
        try:
            [choice] = answer["choices"]
            token_ids = [_integer(token) for token in choice["token_ids"]]
            content = choice["logprobs"]["content"]
            logged = [_integer(token["token_id"]) for token in content]
            log_probs = [_number(token["logprob"]) for token in content]
            spans = [
                (str(span["version"]), _integer(span["start"]), _integer(span["end"]))
                for span in choice["weight_versions"] or []
            ]
            finish_reason = str(choice["finish_reason"])
            prompt = _prompt_log_probs(answer, request) if "prompt_logprobs" in request.sampling else []
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._error(
                f"expected one choice with token_ids, logprobs, weight_versions and finish_reason, got {_shown(answer)}"
            ) from error
        if logged != token_ids:
            raise self._error(
                f"expected tokens with a log-prob each, got {len(token_ids)} tokens and {len(log_probs)} log-probs"
                f"{' of other tokens' if len(token_ids) == len(log_probs) else ''}"
            )
        return possible_output(
            request,
            self._vocab_size,
            self.name,
            token_ids=token_ids,
            log_probs=log_probs,
            finish_reason=finish_reason,
            versions=spans,
            prompt_log_probs=prompt,
        )

    def _error(self, message: str) -> EngineError:
        return EngineError(f"{self.address}: {message}")


def _prompt_log_probs(answer: Any, request: EngineRequest) -> list[float]:
    """Return the log-probs of the tokens of the request but the first."""
    entries = answer["prompt_logprobs"][1:]
    own = zip(request.token_ids[1:], entries, strict=True)
    return [_number(entry[str(token)]["logprob"]) for token, entry in own]


def _integer(value: Any) -> int:
    """Return ``value``; raise TypeError unless it is an integer, which a boolean and 1.0 are not."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    """Return a number of JSON as a float; raise TypeError for anything else, and OverflowError if it is too large."""
    return value if type(value) is float else float(_integer(value))


def _reason(text: str) -> str:
    """Return the message in an answer that reports an error, without the JSON around it."""
    try:
        return _shown(str(json.loads(text)["error"]["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return _shown(text)


def _shown(answer: Any) -> str:
    try:
        text = answer if isinstance(answer, str) else json.dumps(answer)
    except RecursionError:
        text = "an answer that is nested too deeply"
    return text[:_SHOWN_CHARS] + ("..." if len(text) > _SHOWN_CHARS else "")
