# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sessions of environments with a state: one process per episode.

    trainer's rank --starts--> environment's process --forks--> one process per session

The environment's process imports the class of the user and makes the environment once; it sees no text of the model.
Each session is a fork of it, in which the environment plays one episode: what the model writes reaches no other
process.  Requests and replies are lines of JSON, which the trainer reads as data.  A session that raises, hangs or dies
costs its own episode and nothing else.  All sessions end if their rank ends, also if it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from megatron_selfdistill.config import function_named
from megatron_selfdistill.config.functions import own_lines
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.stop import how_ended
from megatron_selfdistill.environments.environment import BUILT_IN, SessionEnvironment, SessionLimits

_READY = b"ready"
_MAX_BYTES = 10_000_000
"""The greatest length of a reply."""
_MAX_CONTROL_BYTES = 10_000
_START_SECONDS = 300.0
"""Seconds in which the environment's process must have made the environment."""
_CLOSE_SECONDS = 5.0
"""Seconds that a session has for ``close``."""
_GB = 10**9


class SessionError(Exception):
    """The end of a session that gave no reply; the message is the reason."""


class SessionProcesses:
    """The sessions of one rank, each under a key.  Any number of threads may call the methods."""

    def __init__(self, name: str, options: Mapping[str, Any], limits: SessionLimits) -> None:
        """Start the process that makes the environment ``name`` with ``options``.

        Raises: RuntimeError if the process does not make the environment, with the reason.
        """
        self._limits = limits
        self._lock = threading.Lock()
        self._sessions: dict[Hashable, tuple[socket.socket, int]] = {}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_variables(os.environ, keep=options.get("api_key_env")),
                start_new_session=True,  # Ctrl-C is for the trainer, which decides what ends
            )
        self._process = process
        self._end = weakref.finalize(self, _end_process, process, self._control)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps({"name": name, "options": dict(options), "memory_gb": limits.memory_gb}).encode())
        self._control.settimeout(_START_SECONDS)
        try:
            answer = self._control.recv(_MAX_CONTROL_BYTES)
        except TimeoutError:
            answer = f"it was not made within {_START_SECONDS:g} s".encode()
        if answer != _READY:
            self.close()
            raise RuntimeError(answer.decode(errors="replace") or "its process ended")
        self._control.settimeout(limits.seconds)

    def reset(self, key: Hashable, problem: Problem, seed: int) -> Reply:
        """Start the session ``key`` and return a reply with the text and the hint that come before its first response.

        A session that fails gives a `Reply` with ``failure``, and has ended.
        Raises: RuntimeError if the environment's process has ended.
        """
        mine, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                self._sessions[key] = mine, int(self._asked(b"start", [theirs.fileno()]))
            except (OSError, ValueError) as error:
                mine.close()
                raise RuntimeError(f"the process of the environment has ended ({error})") from error
        fields = {name: getattr(problem, name) for name in _PROBLEM_FIELDS}
        return self._reply(key, {"call": "reset", "problem": fields, "seed": seed})

    def step(self, key: Hashable, response: str) -> Reply:
        """Return the reply of the session ``key`` to ``response``.  A session whose episode is over has ended.

        A session that fails gives a `Reply` with ``failure``.
        """
        return self._reply(key, {"call": "step", "response": response})

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sessions

    def end(self, key: Hashable) -> None:
        """Call ``close`` of the session ``key`` and end its process, with all processes that it has started."""
        connection, _ = self._sessions[key]
        with contextlib.suppress(SessionError, EOFError):
            _exchanged(connection, {"call": "close"}, _CLOSE_SECONDS)
        self._killed(key)

    def end_all(self) -> None:
        """End every session that there is."""
        for key in list(self._sessions):
            self.end(key)

    def close(self) -> None:
        """End the environment's process and every session."""
        for connection, _ in self._sessions.values():
            connection.close()
        self._sessions.clear()
        self._end()

    def _reply(self, key: Hashable, request: Mapping[str, Any]) -> Reply:
        if key not in self._sessions:
            raise RuntimeError("the process of the environment has ended")
        try:
            reply = Reply(**_exchanged(self._sessions[key][0], request, self._limits.seconds))
        except (TypeError, ValueError) as error:
            reply = Reply(failure=f"{request['call']} returned no Reply: {error}")
        except SessionError as error:
            reply = Reply(failure=str(error))
        except EOFError:
            return Reply(failure=f"the process of the session ended in {request['call']}: {self._killed(key)}")
        if reply.failure is not None:
            self._killed(key)
        elif not reply.goes_on and request["call"] == "step":
            self.end(key)
        return reply

    def _killed(self, key: Hashable) -> str:
        """Kill the session's process group and return how its process ended: the signal or the status."""
        with self._lock:
            connection, pid = self._sessions.pop(key, (None, None))
            if connection is not None:
                connection.close()
                with contextlib.suppress(OSError):
                    return self._asked(str(pid).encode())
        return "with the environment's process"

    def _asked(self, request: bytes, descriptors: Sequence[int] = ()) -> str:
        """Return the answer of the environment's process to a request, which one thread makes at a time.

        Raises: OSError where the process has ended, or does not answer within the limit and is ended.
        """
        try:
            self._process.send_signal(signal.SIGCONT)  # a session can stop its parent
            socket.send_fds(self._control, [request], descriptors)
            return self._control.recv(_MAX_CONTROL_BYTES).decode()
        except TimeoutError:
            self.close()
            raise


_PROBLEM_FIELDS = ("id", "messages", "solution", "answer", "location", "tools")
"""The fields of a problem that a session gets."""
_SECRET = re.compile("(^|_)(API_?KEY|ACCESS_KEY|SECRET_KEY|SECRET|PASSWORD|PASSWD|TOKEN)$", re.IGNORECASE)


def _variables(environ: Mapping[str, str], keep: str | None = None) -> dict[str, str]:
    """Return the variables of the environment's process: those of the trainer without secrets, and its import path.

    ``keep``: the variable of the one secret that the environment needs.
    """
    kept = {name: value for name, value in environ.items() if name == keep or not _SECRET.search(name)}
    return {**kept, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "CUDA_VISIBLE_DEVICES": ""}


def _end_process(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()  # on which the process kills the sessions and ends
    process.send_signal(signal.SIGCONT)
    try:
        process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _exchanged(connection: socket.socket, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Send ``request`` and return the answer.  Raises: SessionError without an answer; EOFError for a closed end."""
    deadline = time.monotonic() + seconds
    received = bytearray()
    try:
        connection.settimeout(seconds)
        connection.sendall(json.dumps(request).encode() + b"\n")
        while not received.endswith(b"\n"):
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(1 << 16)
            if not part:
                raise EOFError
            received += part
            if len(received) > _MAX_BYTES:
                raise SessionError(f"{request['call']} gave a reply of more than {_MAX_BYTES} bytes")
        answer = json.loads(received)
    except TimeoutError:
        raise SessionError(f"{request['call']} gave no reply within {seconds:g} s") from None
    except OSError as error:
        raise EOFError from error
    except (ValueError, RecursionError):
        raise SessionError(f"{request['call']} gave a reply that is not JSON") from None
    if not isinstance(answer, dict):
        raise SessionError(f"{request['call']} gave a reply that is no object")
    return answer


# What follows runs in the environment's process and in the sessions.


def _served(control: socket.socket, environment: SessionEnvironment, memory_gb: float | None) -> None:
    """Fork and kill sessions as the rank asks for, until it closes its end; then kill the rest."""
    pids: set[int] = set()
    try:
        while True:
            request, descriptors, _, _ = socket.recv_fds(control, _MAX_CONTROL_BYTES, 1)
            if not request:
                return
            if not descriptors:
                pid = int(request)
                pids.remove(pid)
                control.send(_ended(pid).encode())
                continue
            with socket.socket(fileno=descriptors[0]) as connection:
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _play(environment, connection, memory_gb)
            pids.add(pid)
            control.send(str(pid).encode())
    except OSError:  # the rank was killed
        return
    finally:
        for pid in pids:
            _ended(pid)


def _ended(pid: int) -> str:
    """Kill the process group of a session and return how the session had ended before."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)  # also a session that has no group of its own yet; one that has ended keeps its status
    _, status = os.waitpid(pid, 0)
    return how_ended(os.waitstatus_to_exitcode(status))


def _play(environment: SessionEnvironment, connection: socket.socket, memory_gb: float | None) -> NoReturn:
    os.setsid()  # a process group of its own, which ends as a whole
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * _GB),) * 2)
    loop = asyncio.new_event_loop()
    calls: dict[str, Callable[[dict[str, Any]], Any]] = {
        "reset": lambda asked: environment.reset(Problem(**asked["problem"]), asked["seed"]),
        "step": lambda asked: environment.step(asked["response"]),
        "close": lambda asked: environment.close(),
    }
    with connection.makefile("rb") as requests:
        for line in requests:
            asked = json.loads(line)
            for name in ("messages", "tools") if asked["call"] == "reset" else ():
                asked["problem"][name] = tuple(asked["problem"][name])
            try:
                result = calls[asked["call"]](asked)
                if inspect.isawaitable(result):
                    result = loop.run_until_complete(result)
                answer = _answer(asked["call"], result)
            except BaseException as error:  # also SystemExit: the answer is the reason
                answer = {"failure": _text(f"{asked['call']} raised {type(error).__name__}: {error}{own_lines(error)}")}
            connection.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _answer(call: str, result: Any) -> dict[str, Any]:
    if call == "close":
        return {}
    if call == "reset":
        opening = result if isinstance(result, Reply) else Reply(text=result)
        return asdict(Reply(text=opening.text, hint=opening.hint, done=False))
    if not isinstance(result, Reply):
        raise TypeError(f"expected a Reply of megatron_selfdistill.environments, got {result!r:.80}")
    return asdict(result)


def _text(message: str) -> str:
    """Return ``message`` with halves of surrogate pairs as escapes: UTF-8 does not have them."""
    return message.encode(errors="backslashreplace").decode()


def main() -> None:
    """Make the environment that standard input describes, and serve its rank, whose socket is the argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(AttributeError, OSError):  # Linux: the end of the rank wakes this process if it is stopped
        ctypes.CDLL(None).prctl(1, signal.SIGCONT)  # PR_SET_PDEATHSIG
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the rank decides what ends; a program that a session starts differs
    wanted = json.load(sys.stdin)
    try:
        environment = function_named("environment.name", wanted["name"], BUILT_IN)(**wanted["options"])
    except BaseException as error:  # also SystemExit
        control.send(_text(f"{type(error).__name__}: {error}{own_lines(error)}").encode()[:_MAX_CONTROL_BYTES])
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the class may have changed it, and then no session has a status
    control.send(_READY)
    _served(control, environment, wanted["memory_gb"])


if __name__ == "__main__":
    main()
