# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what responses from vLLM servers cost rank 0's interpreter.

    python tools/benchmarks/server_responses.py --responses 1000 --tokens 1400 --servers 4 --in-flight 64

The servers are one process that answers every request with the same response, in JSON as vLLM writes it; rank 0 is
this process, with the sampler's own batch of requests.  The table has the CPU seconds of this process, all its threads
together, in which its interpreter launches no kernels, and the greatest number of threads that this process has beside
its main thread.  Each server answers once ``--in-flight`` requests are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser

_PAUSE_SECONDS = 0.02
_STOP_TOKEN = 7
_VOCAB = 50_000
_PROMPT_TOKENS = 300


def main() -> None:
    """Measure, and print the table."""
    arguments = _parser().parse_args()
    found = [_measure(arguments) for _ in range(arguments.repeats)]
    print(_table(found, arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "json": found}, indent=2))


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds and the threads of one batch."""
    from megatron_selfdistill.engines.vllm.client import VllmServer
    from megatron_selfdistill.engines.vllm.coroutines import run
    from megatron_selfdistill.engines.vllm.exchange import WeightAge
    from megatron_selfdistill.engines.vllm.server_batch import BusyTime, ServerBatch
    from megatron_selfdistill.rollout.base import Request, SamplingParams

    requests = [Request([1 + i % 999] * _PROMPT_TOKENS, i) for i in range(arguments.responses)]
    params = SamplingParams(max_new_tokens=arguments.tokens + 1, stop_token_ids=(_STOP_TOKEN,))
    with _answering(arguments) as addresses:
        servers = [VllmServer(address, vocab_size=_VOCAB) for address in addresses]
        for server in servers:
            run(server.health())
        threads = _MostThreads()
        before, began = time.process_time(), time.perf_counter()
        batch = ServerBatch(requests, params, WeightAge(0, 0), servers, {}, BusyTime())
        batch.join()
        seconds, wall = time.process_time() - before, time.perf_counter() - began
        most = threads.stop()
    responses = batch.so_far()
    assert len(responses) == len(requests) and {len(one.token_ids) for one in responses.values()} == {arguments.tokens}
    return {"seconds": seconds, "wall": wall, "threads": most}


class _MostThreads:
    """The greatest number of threads of this process beside the main thread and the one that counts them."""

    def __init__(self) -> None:
        self._most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def stop(self) -> int:
        """Return the greatest number so far."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _count(self) -> None:
        while not self._ended.wait(_PAUSE_SECONDS):
            self._most = max(self._most, threading.active_count() - 2)


@contextmanager
def _answering(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the addresses of servers that answer in a process of their own."""
    spawn = multiprocessing.get_context("spawn")
    ports: Any = spawn.Queue()
    settings = (arguments.servers, arguments.tokens, arguments.in_flight, ports)
    process = spawn.Process(target=_serve, args=settings, daemon=True)
    process.start()
    try:
        yield [f"http://127.0.0.1:{ports.get(timeout=60)}" for _ in range(arguments.servers)]
    finally:
        process.terminate()
        process.join()


def _serve(count: int, num_tokens: int, in_flight: int, ports: Any) -> None:
    """Serve responses of ``num_tokens`` tokens, each once ``in_flight`` requests of a server wait."""
    response = _response(num_tokens)

    def answering(gate: _Gate) -> Any:
        return lambda reader, writer: _answer(reader, writer, response, gate)

    async def serve() -> None:
        for _ in range(count):
            server = await asyncio.start_server(answering(_Gate(in_flight)), "127.0.0.1", backlog=in_flight)
            ports.put(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


class _Gate:
    """A gate that opens when ``count`` requests have come, and stays open."""

    def __init__(self, count: int) -> None:
        self._count, self._open = count, asyncio.Event()

    async def come(self) -> None:
        """Return when the gate is open."""
        self._count -= 1
        if self._count <= 0:
            self._open.set()
        await self._open.wait()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, response: bytes, gate: _Gate) -> None:
    """Answer one request; any request but one for a response has an empty answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
    await reader.readexactly(int(fields.get("content-length", 0)))
    generates = "/inference/v1/generate" in head.split("\r\n")[0]
    if generates:
        await gate.come()
    body = response if generates else b""
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    writer.close()


def _response(num_tokens: int) -> bytes:
    """Return a response of ``num_tokens`` tokens, as a vLLM server writes it."""
    tokens = [10_000 + i % 30_000 for i in range(num_tokens - 1)] + [_STOP_TOKEN]
    log_probs = [-0.0123456789 * (1 + i % 97) for i in range(num_tokens)]
    both = zip(tokens, log_probs, strict=True)
    content = [
        {
            "token_id": token,
            "logprob": log_prob,
            "rank": 1,
            "top_logprobs": [{"token_id": token, "logprob": log_prob, "rank": 1}],
        }
        for token, log_prob in both
    ]
    choice = {
        "index": 0,
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "token_ids": tokens,
        "weight_versions": [{"version": "0", "start": 0, "end": num_tokens}],
    }
    return json.dumps({"request_id": "0", "choices": [choice], "prompt_logprobs": None}).encode()


def _table(found: list[dict[str, float]], arguments: argparse.Namespace) -> str:
    per_thousand = 1000 / arguments.responses
    lines = [
        f"{arguments.responses} responses of {arguments.tokens} tokens, {arguments.servers} servers with up to "
        f"{arguments.in_flight} requests in flight each; medians of {arguments.repeats}; seconds per 1,000 responses",
        "",
        "| answers | rank 0, CPU s | microseconds per token | threads |",
        "|---|---|---|---|",
    ]
    seconds = statistics.median(run["seconds"] for run in found)
    lines.append(
        f"| json | {seconds * per_thousand:.2f} | {seconds / arguments.responses / arguments.tokens * 1e6:.2f} | "
        f"{max(run['threads'] for run in found):.0f} |"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    return measuring_parser(__doc__, {"responses": 1000, "tokens": 1400, "servers": 4, "in-flight": 64, "repeats": 3})


if __name__ == "__main__":
    main()
