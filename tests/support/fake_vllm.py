# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A server with the protocol of a vLLM server, without vLLM.

Its responses depend on the prompt alone, it keeps the weights that it receives, and a test sets its faults.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import begin
from megatron_selfdistill.engines.vllm.engine import EngineRequest
from megatron_selfdistill.engines.vllm.plugin.receivers import RECEIVERS, Receiver
from megatron_selfdistill.engines.vllm.protocol import Layout, boot_id, digest, unpack
from megatron_selfdistill.rollout.base import Response


def tokens_behind(prompt: list[int], count: int, vocab_size: int = 50) -> list[int]:
    """Return the response of every fake server to a prompt: ``count`` tokens below ``vocab_size``."""
    return [(sum(prompt) + i) % vocab_size for i in range(count)]


def answer_to(
    body: dict[str, Any], versions: tuple[str, str], vocab_size=50, ends=False, aborted=False, log_prob=-0.5
) -> dict[str, Any]:
    """Return the answer of ``/inference/v1/generate`` to a request.

    ``versions``: those of the weights at the beginning and at the end of the response; if they differ, all tokens but
    the first come from the second one.  ``ends``: whether the response ends with a stop token of the request, rather
    than at its greatest length.  ``log_prob``: that of every token.
    """
    sampling = body["sampling_params"]
    tokens = tokens_behind(body["token_ids"], sampling["max_tokens"], vocab_size)
    if ends:
        tokens[-1] = sampling["stop_token_ids"][0]
    content = [{"token_id": token, "logprob": log_prob, "rank": 1, "top_logprobs": []} for token in tokens]
    first, last = versions
    spans = [{"version": first, "start": 0, "end": 1}, {"version": last, "start": 1, "end": len(tokens)}]
    if first == last:
        spans = [{"version": last, "start": 0, "end": len(tokens)}]
    reason = "abort" if aborted else "stop" if ends else "length"
    about = {"index": 0, "finish_reason": reason, "weight_versions": spans}
    return {"choices": [{**about, "token_ids": tokens, "logprobs": {"content": content}}]}


def generated(server: VllmServer, requests: Sequence[EngineRequest]) -> list[Response]:
    """Return the responses to ``requests``, which are at the server at once; if one fails, the others are dropped."""
    begun = [begin(server.generate(request)) for request in requests]
    try:
        return [each.result() for each in begun]
    except Exception:
        server.interrupt()
        raise


class FakeVllm(ThreadingHTTPServer):
    """A server that listens at ``address``; its attributes set its faults, in Python or through ``POST /fault``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.token = ""
        self.vocab_size = 50  # the number of tokens that responses consist of
        self.log_prob = -0.5  # the log-prob of every token of a response
        self.ends = False  # whether responses end with a stop token
        self.seconds = 0.0  # seconds that a response takes
        self.seconds_of: Callable[[list[int]], float] = lambda prompt: 0.0
        """The seconds more that the response to a prompt takes."""
        self.together = 0  # the number of requests for which each response waits
        self.holds: list[int] = []  # the first tokens of prompts whose responses wait until a test removes them here
        self.die_at = 0  # the number of the response at whose start the server dies; 0 is never
        self.hang_at = 0  # the number of the first response that never comes; 0 is never
        self.gets_on = False  # whether the server's count of tokens grows all the time
        self.counts = True  # whether the server counts tokens
        self.fail_at = ""  # the path that answers with status 500
        self.hangs_at = ""  # the path that never answers
        self.endless_at = ""  # the path whose answer never ends: one long number in JSON
        self.drips_at = ""  # the path whose headers come one byte at a time
        self.texts: dict[str, str] = {}
        """Path, or method of /collective_rpc -> the characters of its answer, or of its result."""
        self.status = 200  # The HTTP status of responses
        self.says = ""  # the characters that replace every response, if not empty
        self.writes_version = ""  # the version of the weights that responses state falsely, if not empty
        self.max_model_len = 10_000
        self.workers: list[dict[str, Any]] = [{"host": "here", "boot_id": boot_id(), "address": "", "nccl": None}]
        """The answer of `VllmServer.workers`; the server really has one worker."""
        self.blind: list[str] = []  # the hosts whose workers cannot read the trainer's files
        self.restart()

    def restart(self) -> None:
        """Forget all weights and calls, like a server that has just started."""
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}  # the tensors of the last update
        self.adapter: dict[str, Any] | None = None
        self.models: Counter[str | None] = Counter()
        """The names of the adapters of all requests; None stands for no adapter."""
        self.paused = False
        self.num_aborts = 0  # the number of pauses that have aborted the responses under way
        self.calls: list[str] = []
        self.answered: Counter[str] = Counter()
        self.begun = 0
        self.transfer = ""
        self.receiver: Receiver | None = None
        self.dead = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback where a client has closed its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def metrics(self) -> str:
        """Return the answer of ``/metrics``, with lines that the trainer does not read."""
        count = time.monotonic_ns() if self.gets_on else 5
        lines = ["# TYPE vllm:prompt_tokens_total counter", 'vllm:num_requests_running{engine="0"} 2.0']
        if self.counts:
            total = 'vllm:{}_tokens_total{{engine="0",model_name="m"}} {}.0'
            lines += [total.format(kind, count) for kind in ("prompt", "generation")]
        return "\n".join(lines)

    def take_part(self, info: dict[str, Any]) -> None:
        if self.receiver is not None:
            self.receiver.close()
        self.transfer = info["transfer"]
        self.receiver = RECEIVERS[self.transfer](torch.device("cpu"), 0, **info["arguments"])

    def update(self, info: dict[str, Any]) -> None:
        """Receive a bucket of weights, or compare all weights with the digest of a complete update."""
        assert self.receiver is not None, "expected /init_weight_transfer_engine before weights"
        if "complete" in info:
            assert info["complete"] == digest(self.weights)
            return
        layout = Layout(info["names"], info["dtypes"], info["shapes"])
        packed = self.receiver.receive(layout.num_bytes, info.get("where", {}))
        self.weights.update((name, tensor.clone()) for name, tensor in unpack(packed, layout))


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: dict[str, Any]) -> None:
        fake, path = self.server, self.path.split("?")[0]
        if path == "/fault":
            for name, value in body.items():
                fake.restart() if name == "restart" else setattr(fake, name, value)
            self._reply(200, {})
        elif fake.dead:
            self.close_connection = True
        elif fake.token and path != "/health" and self.headers["Authorization"] != f"Bearer {fake.token}":
            self._reply(401, {"error": "token"})
        else:
            fake.calls.append(" ".join([path, *([body["method"]] if path == "/collective_rpc" else [])]))
            while path == fake.hangs_at:
                time.sleep(0.01)
            if path == fake.drips_at:
                self._drip_headers()
            elif path == fake.endless_at:
                self._never_end()
            elif path in fake.texts:
                self._reply(200, fake.texts[path])
            elif path == "/collective_rpc" and body["method"] in fake.texts:
                self._reply(200, f'{{"results": [{fake.texts[body["method"]]}]}}')
            elif path == fake.fail_at:
                self._reply(500, {"error": {"message": "a test made this path fail"}})
            elif path == "/inference/v1/generate":
                self._generate(body)
            else:
                fake.num_aborts += self.path == "/pause?mode=abort"
                self._reply(200, self._control(path, body))

    def _drip_headers(self) -> None:
        self.close_connection = True
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X" * 10_000:
            if not self.server.drips_at:
                break
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def _never_end(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        while self.server.endless_at:
            self.wfile.write(b"1" * 2**16)

    def _generate(self, body: dict[str, Any]) -> None:
        fake = self.server
        with fake.lock:
            fake.begun += 1
            number = fake.begun
        if number == fake.die_at:
            fake.dead = True
        while fake.paused:
            time.sleep(0.01)
        first, num_aborts, held = fake.version, fake.num_aborts, body["token_ids"][0]
        while fake.begun < fake.together or (fake.hang_at and number >= fake.hang_at) or held in fake.holds:
            time.sleep(0.01)
        time.sleep(fake.seconds + fake.seconds_of(body["token_ids"]))
        while fake.paused:
            time.sleep(0.01)
        if fake.dead:
            self.close_connection = True
            return
        with fake.lock:
            fake.answered[json.dumps(body["token_ids"])] += 1
            fake.models[body.get("model")] += 1
        versions = (fake.writes_version or first, fake.writes_version or fake.version)
        aborted = num_aborts < fake.num_aborts
        answer = answer_to(body, versions, fake.vocab_size, fake.ends, aborted, fake.log_prob)
        self._reply(fake.status, fake.says or answer)

    def _control(self, path: str, body: dict[str, Any]) -> Any:
        fake = self.server
        if path == "/metrics":
            return fake.metrics()
        if path == "/weight_info":
            return {"weight_version": fake.version}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/v1/models":
            return {"data": [{"id": "fake", "max_model_len": fake.max_model_len}]}
        if path == "/collective_rpc":
            return {"results": self._results(body["method"], body["args"])}
        if path in ("/pause", "/resume"):
            fake.paused = path == "/pause"
        elif path == "/init_weight_transfer_engine":
            fake.take_part(body["init_info"])
        elif path == "/start_weight_update":
            fake.weights = {}
        elif path == "/update_weights":
            fake.update(body["update_info"])
        elif path in ("/finish_weight_update", "/update_weight_version"):
            fake.version = body.get("weight_version") or body["new_version"]
        return {"success": True}

    def _results(self, method: str, arguments: list[Any]) -> list[Any]:
        fake = self.server
        if method == "place":
            return fake.workers
        if method == "can_read":
            exists = Path(arguments[0]).exists()
            hosts = [worker["host"] for worker in fake.workers]
            return [{"can_read": exists and host not in fake.blind, "host": host} for host in hosts]
        if method == "load_factors":
            [fake.adapter] = arguments
            return [None]
        return [{"method": method, "args": arguments}]

    def _reply(self, status: int, answer: Any) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def fake_servers(count: int) -> Iterator[list[FakeVllm]]:
    servers = [FakeVllm() for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.together, server.hang_at, server.hangs_at, server.holds, server.paused = 0, 0, "", [], False
            server.endless_at = server.drips_at = ""
            server.shutdown()
            server.server_close()
