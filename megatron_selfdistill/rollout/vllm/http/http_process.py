# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Rank 0's side of the process that speaks HTTP for it (child.py): one such process, and one thread that reads from it.

future = http_process().begin(access, Ask("GET", "/health"))
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import megatron_selfdistill
from megatron_selfdistill.distributed import stop
from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.vllm.http import child
from megatron_selfdistill.rollout.vllm.http.http_tasks import Ask, Drop, Generate, Leave, Messages, ServerAccess, Task
from megatron_selfdistill.rollout.vllm.http.response_answer import RequestRefused
from megatron_selfdistill.rollout.vllm.http.stated_response import GENERATE

T = TypeVar("T")

# The patience with a silent server once a signal has asked the run to end: the same signal may have ended the server,
# and the run needs the rest of its time for a checkpoint.
_LEAVING_SECONDS = 15.0
_POLL_MILLISECONDS = 1000
_GIVEN_UP = "given up, since another request failed or the sampler was closed"
# Numerical libraries start a thread per core where they are imported, unless these variables say otherwise.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class HttpProcessEnded(EngineError):
    """The process that speaks HTTP has ended, which is the failure of no server."""


@dataclass(frozen=True)
class HttpReply:
    """What the process says about a task, as the task describes it."""

    head: Mapping[str, Any]
    parts: list[memoryview]
    """The numbers of tokens, or the body of the answer, in shared memory."""


@dataclass(frozen=True)
class _Pending:
    access: ServerAccess
    name: str
    """The method and the path of the request."""
    convert: Callable[[HttpReply], Any]
    result: Future[Any] = field(default_factory=Future)


class HttpProcess:
    """A process that speaks HTTP, which ends with this one.  Any number of threads may use it at once."""

    def __init__(self) -> None:
        """Start the process, and the thread that reads what the process says."""
        self._messages, theirs = Messages.pair()
        paths = [str(Path(megatron_selfdistill.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-P", "-m", child.__name__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._patience_s: float | None = None
        self.end: str | None = None
        """The way in which the process has ended; None while it runs."""
        threading.Thread(target=self._read, name="http-replies", daemon=True).start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def begin(self, access: ServerAccess, task: Ask | Generate, convert: Callable[[HttpReply], T]) -> Future[T]:
        """Let the process do a task, and return ``convert`` of its reply to come; the thread that reads converts it.

        The future raises what ``convert`` raises, and `EngineError` where the task fails: `RequestRefused` where the
        server refuses it, `HttpProcessEnded` where the process ends.
        """
        name = f"POST {GENERATE}" if isinstance(task, Generate) else f"{task.method} {task.path}"
        pending = _Pending(access, name, convert)
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = pending
        self._tell_patience()
        try:
            self._send(number, access, task)
        except OSError as error:  # no memory, or no descriptor
            with self._lock:
                is_ours = self._pending.pop(number, None) is not None
            if is_ours:
                pending.result.set_exception(EngineError(f"{access.address}: {name}: cannot be sent: {error}"))
        if self.end is not None:
            self._lose()  # the thread that reads may have seen the end before this task
        return pending.result

    def interrupt(self, access: ServerAccess) -> None:
        """Let every task of a client that is under way raise `EngineError`; the server drops the request."""
        with self._lock:
            dropped = {number: one for number, one in self._pending.items() if one.access.key == access.key}
            for number in dropped:
                del self._pending[number]
        for one in dropped.values():
            one.result.set_exception(EngineError(f"{access.address}: {one.name}: {_GIVEN_UP}"))
        if dropped:
            self._send(0, access, Drop(list(dropped)))

    def forsake(self) -> None:
        """Close this end in a process that was forked from the one that uses it."""
        self._messages.close()

    def _tell_patience(self) -> None:
        """Tell the process where a signal has asked the run to end, since the process itself ignores signals."""
        patience_s = _LEAVING_SECONDS if stop.asked() else None
        if patience_s != self._patience_s:
            self._patience_s = patience_s
            self._send(0, None, Leave(patience_s))

    def _send(self, number: int, access: ServerAccess | None, task: Task) -> None:
        with contextlib.suppress(ConnectionError):  # the thread that reads sees the end too
            self._messages.send(pickle.dumps((number, access, task), pickle.HIGHEST_PROTOCOL))

    def _read(self) -> None:
        """Take what the process says until it ends."""
        poll = select.poll()
        poll.register(self._messages, select.POLLIN)
        try:
            is_open = True
            while is_open:
                self._tell_patience()
                is_open = not poll.poll(_POLL_MILLISECONDS) or self._take_one()
            end = _end_of(self._process.wait())
        except OSError as error:  # no memory, or no descriptor
            self._process.kill()
            self._process.wait()
            end = f"was ended, since its answers cannot be read ({error})"
        self.end = end
        self._lose()

    def _take_one(self) -> bool:
        """Take one message; return whether the process goes on."""
        parts = self._messages.receive()
        if parts is None:
            return False
        complete = self._taken(json.loads(bytes(parts[0])), parts[1:])
        del parts  # an exception in what waits for the result may keep this frame, and with it the shared memory
        complete()
        return True

    def _taken(self, head: dict[str, Any], parts: list[memoryview]) -> Callable[[], None]:
        """Return the function that completes the task of a message."""
        number = head["number"]
        if number == 0:
            return beat
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return lambda: None  # dropped meanwhile
        if "error" in head:
            kind = RequestRefused if head["refused"] else EngineError
            return partial(pending.result.set_exception, kind(head["error"]))
        try:
            return partial(pending.result.set_result, pending.convert(HttpReply(head, parts)))
        except Exception as error:
            return partial(pending.result.set_exception, error)

    def _lose(self) -> None:
        """Let all tasks raise that the process has ended."""
        with self._lock:
            lost, self._pending = list(self._pending.values()), {}
        for one in lost:
            one.result.set_exception(
                HttpProcessEnded(
                    f"{one.access.address}: {one.name}: the trainer's process that speaks HTTP with the vLLM servers "
                    f"(pid {self.pid}) {self.end}, and its requests are lost: did the system run out of memory?"
                )
            )


_current: HttpProcess | None = None
_starting = threading.Lock()


def http_process() -> HttpProcess:
    """Return the process that speaks HTTP for this one; start it at the first call and where it has ended.

    Raises: `EngineError` where the system cannot start it.
    """
    global _current
    with _starting:
        if _current is None or _current.end is not None:
            try:
                _current = HttpProcess()
            except OSError as error:
                raise EngineError(
                    f"cannot start the process that speaks HTTP with the vLLM servers: {error}"
                ) from error
        return _current


def _end_of(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _forsake() -> None:
    """Forget the process in a fork of this one, so that it ends with its parent."""
    global _current, _starting
    if _current is not None:
        _current.forsake()
    _current, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_forsake)
