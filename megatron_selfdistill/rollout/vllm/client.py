# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM server over HTTP, as an `Engine`, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import re
import select
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import FINISH_REASONS
from megatron_selfdistill.rollout.vllm.engine import EngineOutput, EngineRequest, oldest_version

MAX_IN_FLIGHT = 512
"""Number of requests that one server works on at once; further requests wait here."""

_POLL_SECONDS = 1.0
# Timeout of requests to a server that has let one request wait for `timeout_s`, until it answers again.
_SILENT_TIMEOUT_SECONDS = 10.0
_LOOKS = 4  # the number of times per `timeout_s` that a silent server must state its token count
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)
_SHOWN_CHARS = 500


class RequestRefused(EngineError):
    """The server refuses the request; another server would refuse it too."""


class VllmServer:
    """The server at ``address`` (``http://host:port``); ``token`` is sent with every request unless it is empty.

    Any number of threads may use it at once.  Every failure is an `EngineError` with the address and the cause: no
    connection, an answer of another form, an error of the server, and silence.  A server is silent when it gives no
    answer to any request for ``timeout_s`` while an answer is due and, where the answer is a response, generates no
    token either.
    """

    def __init__(self, address: str, token: str = "", timeout_s: float = 1200.0) -> None:
        self.address = address.rstrip("/")
        self._url = urllib.parse.urlsplit(self.address)
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self.timeout_s = timeout_s
        self._last_sign = 0.0
        self._silent = False
        self._interrupted = threading.Event()
        self._looking = threading.Lock()
        self._looked = 0.0
        self._num_tokens: float | None = None

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"  # without the token

    @property
    def host(self) -> str:
        """Name or number of the server's host, without the port."""
        return self._url.hostname or ""

    @property
    def port(self) -> int:
        """Port of the server, by default that of the scheme."""
        return self._url.port or (443 if self._url.scheme == "https" else 80)

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
        body = {"token_ids": request.token_ids, "sampling_params": dict(request.sampling), "stream": False}
        return self._output(self._ask("POST", "/inference/v1/generate", body, generates=True), request)

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

    def interrupt(self) -> None:
        """Let every request that waits in another thread raise `EngineError`; the server drops the request."""
        self._interrupted.set()
        self._interrupted = threading.Event()

    def health(self, timeout_s: float | None = None) -> None:
        """Return if the server is up and its engine alive, else raise `EngineError`."""
        self._ask("GET", "/health", timeout_s=timeout_s)

    def weight_version(self, timeout_s: float | None = None) -> str:
        """Return the version that `finish_weight_update` or `set_weight_version` set last.

        Before the first of these calls the version may be any word.
        """
        return str(self._field("/weight_info", "weight_version", timeout_s))

    def world_size(self) -> int:
        """Return the number of this server's workers."""
        return int(self._field("/get_world_size", "world_size"))

    def workers(self) -> list[dict[str, Any]]:
        """Return a dictionary for each worker of this server, in the order of their ranks.

        ``host`` is the name of the worker's host and ``boot_id`` the id of the host's running kernel; ``address`` is
        the worker's address among the server's nodes, empty where the server has one node; ``nccl`` is the version of
        its NCCL library, None on a CPU; ``gpus`` are the UUIDs of the GPUs that it sees and ``gpu``
        is that of the GPU on which it computes, None on a CPU.
        """
        return self.call_all("place")

    def max_model_len(self) -> int | None:
        """Return the greatest length of prompt plus response in tokens; None if the server does not report it."""
        models = self._field("/v1/models", "data")
        return models[0].get("max_model_len") if models else None

    def num_tokens(self, timeout_s: float | None = None) -> float | None:
        """Return the tokens that the server has read and generated since its start; None where it keeps no count."""
        status, text = self._exchange("GET", "/metrics", None, timeout_s)
        counts = _TOKENS.findall(text) if status == 200 else []
        return sum(map(float, counts)) if counts else None

    # The calls of one weight update, in order.

    def pause(self) -> None:
        """Stop all work until `resume`; requests that still run, of a trainer that has ended, are aborted."""
        self._ask("POST", "/pause?mode=abort", {})

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
        """End an update in which all weights have arrived, and clear the caches of the old weights."""
        self._ask("POST", "/finish_weight_update", {"weight_version": version})
        answer = self._ask("POST", "/reset_prefix_cache", {})
        if not (isinstance(answer, dict) and answer.get("success")):
            raise self._error("cannot reset its prefix cache: blocks are still in use")

    def resume(self) -> None:
        """Let the server work on requests again."""
        self._ask("POST", "/resume", {})

    def _field(self, path: str, name: str, timeout_s: float | None = None) -> Any:
        answer = self._ask("GET", path, timeout_s=timeout_s)
        if not isinstance(answer, dict) or name not in answer:
            raise self._error(f"expected {name} from {path}, got {_shown(answer)}")
        return answer[name]

    def _ask(
        self, method: str, path: str, body: Any = None, timeout_s: float | None = None, generates: bool = False
    ) -> Any:
        """Return the parsed answer, or None where the answer is empty."""
        status, text = self._exchange(method, path, body, timeout_s, generates)
        self._last_sign = time.monotonic()
        if status != 200:
            kind = RequestRefused if 400 <= status < 500 else EngineError
            raise kind(f"{self.address}: {method} {path} answered {status}: {_reason(text)}")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise self._error(f"{method} {path}: expected JSON, got {_shown(text)}") from error

    def _exchange(
        self, method: str, path: str, body: Any, timeout_s: float | None = None, generates: bool = False
    ) -> tuple[int, str]:
        """Return the status and the text of an answer.

        ``generates``: whether the server generates tokens for the request.
        """
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
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._silent = self._silent or isinstance(error, TimeoutError)
            raise self._error(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        self._silent = False
        return status, text.decode(errors="replace")

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
        asked = time.monotonic()
        while True:
            left = max(asked, self._last_sign) + timeout_s - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {'token' if generates else 'answer'} within {timeout_s:g} s")
            if interrupted.is_set():
                raise ConnectionAbortedError("given up, since another request failed or the sampler was closed")
            if poll.poll(1000 * min(left, _POLL_SECONDS, timeout_s / _LOOKS)):
                return
            if generates:
                self._look(asked, left)

    def _look(self, asked: float, timeout_s: float) -> None:
        """Note a sign of life if the server's count of tokens has grown since the last look.

        One of the waiting threads looks for all of them, and only if the server was silent for a while.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            heard = max(asked, self._last_sign, self._looked)
            if time.monotonic() - heard < self.timeout_s / _LOOKS:
                return
            num_tokens = self.num_tokens(timeout_s)
            self._looked = time.monotonic()
            if num_tokens != self._num_tokens:
                self._num_tokens, self._last_sign = num_tokens, self._looked
                beat()
        except EngineError:
            self._looked = time.monotonic()  # no sign of life: the thread that waits times out
        finally:
            self._looking.release()

    def _output(self, answer: Any, request: EngineRequest) -> EngineOutput:
        """Return the output that an answer holds; raise `EngineError` if a part of it is missing or wrong."""
        try:
            [choice] = answer["choices"]
            token_ids = [int(token) for token in choice["token_ids"]]
            content = choice["logprobs"]["content"]
            log_probs = [float(token["logprob"]) for token in content]
            versions = [str(span["version"]) for span in choice["weight_versions"] or []]
            finish_reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(
                f"expected one choice with token_ids, logprobs, weight_versions and finish_reason, got {_shown(answer)}"
            ) from error
        longest = request.sampling.get("max_tokens", len(token_ids))
        if finish_reason not in FINISH_REASONS:
            raise self._error(f"a response ended with {finish_reason!r}, expected stop or length")
        if not 0 < len(token_ids) <= longest or [int(token["token_id"]) for token in content] != token_ids:
            raise self._error(
                f"expected 1 to {longest} tokens with a log-prob each, got {len(token_ids)} tokens and "
                f"{len(log_probs)} log-probs"
            )
        if finish_reason == "length" and len(token_ids) < longest:
            raise self._error(
                f"a response ended with reason length after {len(token_ids)} of {longest} tokens: the server's "
                "--max-model-len is too small"
            )
        return EngineOutput(token_ids, log_probs, finish_reason, oldest_version(versions))

    def _error(self, message: str) -> EngineError:
        return EngineError(f"{self.address}: {message}")


def _reason(text: str) -> str:
    """Return the message in an answer that reports an error, without the JSON around it."""
    try:
        return _shown(str(json.loads(text)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return _shown(text)


def _shown(answer: Any) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text[:_SHOWN_CHARS] + ("..." if len(text) > _SHOWN_CHARS else "")
