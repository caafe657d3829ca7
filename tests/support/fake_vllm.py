# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A server that speaks as a vLLM server does, without vLLM: what it writes depends on its prompt alone, it keeps the
weights that it was sent, and it fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.rollout.vllm.plugin.receivers import Receiver, make_receiver
from megatron_selfdistill.rollout.vllm.protocol import Layout, boot_id, digest, unpack


def tokens_behind(prompt: list[int], count: int) -> list[int]:
    """What every fake server writes."""
    return [(sum(prompt) + i) % 50 for i in range(count)]


def answer_to(body: dict[str, Any], version: str) -> dict[str, Any]:
    """The answer of ``/inference/v1/generate``."""
    tokens = tokens_behind(body["token_ids"], body["sampling_params"]["max_tokens"])
    content = [{"token_id": token, "logprob": -0.5, "rank": 1, "top_logprobs": []} for token in tokens]
    spans = [{"version": version, "start": 0, "end": len(tokens)}]
    return {
        "choices": [
            {
                "index": 0,
                "token_ids": tokens,
                "logprobs": {"content": content},
                "finish_reason": "length",
                "weight_versions": spans,
            }
        ]
    }


_KINDS = ("prompt", "generation")


class FakeVllm(ThreadingHTTPServer):
    """``address`` is where it listens.  What it does wrong is set by attributes, here or through ``POST /fault``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.token = ""
        self.seconds = 0.0
        """That a response takes."""
        self.together = 0
        """Responses wait until there are so many of them."""
        self.die_at = 0
        """The response at whose beginning the server is gone; 0 is never."""
        self.hang_at = 0
        """The response at which, and behind which, nothing comes any more."""
        self.gets_on = False
        """Its count of tokens grows all the time."""
        self.counts = True
        """It keeps such a count."""
        self.fail_at = ""
        """A path that answers 500."""
        self.hangs_at = ""
        """A path that is never answered."""
        self.status = 200
        """Of responses."""
        self.says = ""
        """Instead of a response: these characters."""
        self.writes_version = ""
        """What responses say of their weights, instead of the truth."""
        self.max_model_len = 10_000
        self.workers = [{"host": "here", "boot_id": boot_id(), "address": "", "nccl": None, "gpus": []}]
        """As `VllmServer.workers` tells; it has one in truth."""
        self.blind: list[str] = []
        """Hosts whose workers cannot read the trainer's files."""
        self.restart()

    def restart(self) -> None:
        """As a server that was started anew."""
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}
        self.calls: list[str] = []
        self.answered: Counter[str] = Counter()
        self.begun = 0
        self.transfer = ""
        self.receiver: Receiver | None = None
        self.dead = False

    def metrics(self) -> str:
        """The answer of ``/metrics``, with what else stands there."""
        count = time.monotonic_ns() if self.gets_on else 5
        lines = ["# TYPE vllm:prompt_tokens_total counter", 'vllm:num_requests_running{engine="0"} 2.0']
        if self.counts:
            lines += [f'vllm:{kind}_tokens_total{{engine="0",model_name="m"}} {count}.0' for kind in _KINDS]
        return "\n".join(lines)

    def take_part(self, info: dict[str, Any]) -> None:
        if self.receiver is not None:
            self.receiver.close()
        self.transfer = info["transfer"]
        self.receiver = make_receiver(self.transfer, torch.device("cpu"), 0, info["arguments"])

    def update(self, info: dict[str, Any]) -> None:
        assert self.receiver is not None, "nobody has said how weights come"
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
            if path == fake.fail_at:
                self._reply(500, {"error": {"message": "it was told to fail"}})
            elif path == "/inference/v1/generate":
                self._generate(body)
            else:
                self._reply(200, self._control(path, body))

    def _generate(self, body: dict[str, Any]) -> None:
        fake = self.server
        with fake.lock:
            fake.begun += 1
            number = fake.begun
        if number == fake.die_at:
            fake.dead = True
        while fake.begun < fake.together or (fake.hang_at and number >= fake.hang_at):
            time.sleep(0.01)
        time.sleep(fake.seconds)
        if fake.dead:
            self.close_connection = True
            return
        with fake.lock:
            fake.answered[json.dumps(body["token_ids"])] += 1
        answer = answer_to(body, fake.writes_version or fake.version)
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
        if path == "/init_weight_transfer_engine":
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
        return [{"method": method, "args": arguments}]

    def _reply(self, status: int, answer: Any) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def fake_servers(count: int) -> Iterator[list[FakeVllm]]:
    """So many of them, listening."""
    servers = [FakeVllm() for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.together, server.hang_at, server.hangs_at = 0, 0, ""
            server.shutdown()
            server.server_close()
