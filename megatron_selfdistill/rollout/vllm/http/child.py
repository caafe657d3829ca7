# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The process that speaks HTTP with vLLM servers, so that rank 0's interpreter trains meanwhile.

    python -P -m megatron_selfdistill.rollout.vllm.http.child DESCRIPTOR

The descriptor is this process's end of the connection (shared_messages.py); what it carries is in http_tasks.py.  The
process ends when the other end is closed, as when rank 0 is killed, and ignores the signals that ask a run to end.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import resource
import signal
import socket
import sys
import time
from collections import deque

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput
from megatron_selfdistill.rollout.vllm.http.http_tasks import (
    MAX_IN_FLIGHT,
    Ask,
    Drop,
    Generate,
    Leave,
    Messages,
    ServerAccess,
)
from megatron_selfdistill.rollout.vllm.http.patient_http import Patience, PatientHttp
from megatron_selfdistill.rollout.vllm.http.response_answer import RequestRefused, max_bytes_of, response_in
from megatron_selfdistill.rollout.vllm.http.stated_response import GENERATE, MEDIA_TYPE, log_prob_bytes, token_bytes

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ACCEPTED = f"{MEDIA_TYPE}, application/json;q=0.5"


def main() -> None:
    """Do what the other end of the connection asks, until it is closed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_work(Messages(socket.socket(fileno=int(sys.argv[1])))))


async def _work(messages: Messages) -> None:
    await _Child(messages).work()


class _Server:
    """A client of a server, with the requests that may be at the server at once."""

    def __init__(self, access: ServerAccess, child: _Child) -> None:
        alive = child.say_alive
        self.http = PatientHttp(access.address, access.token, access.timeout_s, child.patience, alive)
        self.slots = asyncio.Semaphore(MAX_IN_FLIGHT)


class _Child:
    """The tasks that are under way, and the messages that still wait to be sent."""

    def __init__(self, messages: Messages) -> None:
        messages.set_blocking(False)
        self.patience = Patience()
        self._messages = messages
        self._servers: dict[int, _Server] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outgoing: deque[tuple[bytes, ...]] = deque()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def work(self) -> None:
        """Work until the other end is closed."""
        self._loop.add_reader(self._messages, self._receive)
        await self._ended.wait()
        os._exit(0)  # nobody waits for the requests that are under way

    def say_alive(self) -> None:
        """Say that a server has shown signs of life."""
        self._send({"number": 0})

    def _receive(self) -> None:
        try:
            parts = self._messages.receive()
        except BlockingIOError:
            return
        if parts is None:
            self._loop.remove_reader(self._messages)
            self._ended.set()
            return
        number, access, task = pickle.loads(parts[0])  # of rank 0, this process's parent
        if isinstance(task, Drop):
            for dropped in task.numbers:
                if dropped in self._tasks:
                    self._tasks.pop(dropped).cancel()
        elif isinstance(task, Leave):
            self.patience.seconds, self.patience.since = task.patience_s, time.monotonic()
        else:
            if access.key not in self._servers:
                self._servers[access.key] = _Server(access, self)
            self._tasks[number] = self._loop.create_task(self._do(number, self._servers[access.key], task))

    async def _do(self, number: int, server: _Server, task: Ask | Generate) -> None:
        """Do a task and send its answer."""
        try:
            done = _asked(server, task) if isinstance(task, Ask) else _generated(server, task)
            head, *parts = await done
        except EngineError as error:
            head, parts = {"error": str(error), "refused": isinstance(error, RequestRefused)}, []
        except Exception as error:  # whatever a server has sent, rank 0 must not wait for ever
            address = server.http.address
            head, parts = {"error": f"{address}: {type(error).__name__}: {error}", "refused": False}, []
        self._tasks.pop(number, None)
        self._send({"number": number, **head}, *parts)

    def _send(self, head: dict[str, object], *parts: bytes) -> None:
        self._outgoing.append((json.dumps(head).encode(), *parts))
        if len(self._outgoing) == 1:
            self._send_all()

    def _send_all(self) -> None:
        """Send what the other end has room for, and the rest when it has read."""
        while self._outgoing:
            try:
                self._messages.send(*self._outgoing[0])
            except BlockingIOError:
                self._loop.add_writer(self._messages, self._send_all)
                return
            except ConnectionError:
                self._ended.set()
                return
            except OSError as error:  # no memory: rank 0 must not wait for an answer that never comes
                sys.exit(f"cannot hand an answer to rank 0: {error}")
            self._outgoing.popleft()
        self._loop.remove_writer(self._messages)


async def _asked(server: _Server, ask: Ask) -> tuple[dict[str, object], bytes]:
    content = None if ask.body is None else json.dumps(ask.body).encode()
    answer = await server.http.answer(ask.method, ask.path, content, timeout_s=ask.timeout_s)
    return {"status": answer.status, "media_type": answer.media_type}, answer.body


async def _generated(server: _Server, generate: Generate) -> tuple[dict[str, object], bytes, bytes]:
    request = generate.request
    body = {"token_ids": request.token_ids, "sampling_params": dict(request.sampling), "stream": False}
    if generate.model is not None:
        body["model"] = generate.model
    async with server.slots:
        answer = await server.http.answer(
            "POST",
            GENERATE,
            json.dumps(body).encode(),
            generates=True,
            max_bytes=max_bytes_of(request),
            accept=_ACCEPTED,
        )
    output = response_in(answer, request, server.http.address, generate.vocab_size)
    return _said(output), token_bytes(output.token_ids), log_prob_bytes(output.log_probs)


def _said(output: EngineOutput) -> dict[str, object]:
    spans = [list(span) for span in output.weight_spans]
    return {
        "finish_reason": output.finish_reason,
        "weight_version": output.weight_version,
        "weight_spans": spans,
    }


if __name__ == "__main__":
    main()
