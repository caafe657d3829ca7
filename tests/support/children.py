# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Child processes with limits: ranks that stay for several calls, and commands.  What they have started ends with them.

The ranks are new processes, not forks, because a fork of a process that has looked for GPUs cannot use them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 550.0
"""What ends a hang: less than pytest-timeout's limit, and also where that plugin is not installed."""


class Ranks:
    """Processes that call functions of importable modules; they start with the first call."""

    def __init__(self, count: int, without: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """``without``: modules that the processes take for not installed."""
        self._count, self._without, self._environment = count, tuple(without), environment or {}
        self._ranks: dict[connection.Connection, Any] = {}

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns on each rank.

        After a failure all processes are killed, and the next call starts new ones.
        Raises: RuntimeError with the first failure of a rank, or after `LIMIT_S`.
        """
        if not self._ranks:
            self._start()
        found: dict[connection.Connection, Any] = {}
        try:
            for pipe in self._ranks:
                pipe.send((function, arguments))
            while waiting := [pipe for pipe in self._ranks if pipe not in found]:
                ready = connection.wait(waiting, LIMIT_S)
                if not ready:
                    raise RuntimeError(f"{len(waiting)} of {self._count} ranks did not return within {LIMIT_S:.0f} s")
                for pipe in ready:
                    found[pipe] = self._received(pipe)
        except BaseException:
            self.close()
            raise
        return [found[pipe] for pipe in self._ranks]

    def close(self) -> None:
        for pipe, process in self._ranks.items():
            kill(process.pid)
            process.join()
            pipe.close()
        self._ranks = {}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, self._environment):
            for rank in range(self._count):
                ours, theirs = context.Pipe()
                self._ranks[ours] = context.Process(target=_serve, args=(theirs, rank, self._without))
                self._ranks[ours].start()
                theirs.close()

    def _received(self, pipe: Any) -> Any:
        rank, process = list(self._ranks).index(pipe), self._ranks[pipe]
        try:
            error, value = pipe.recv()
        except EOFError:
            process.join()
            error = f"the process ended with {process.exitcode}"
        if error:
            raise RuntimeError(f"rank {rank} of {self._count}: {error}")
        return value


def _serve(pipe: Any, rank: int, without: Sequence[str]) -> None:
    faulthandler.enable()
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                answer = "", function(rank, *arguments)
            except Exception:
                answer = traceback.format_exc(), None
            pipe.send(answer)


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
) -> tuple[int, str]:
    """Run a command in the repository and print its output; return its status and the output.

    Raises: subprocess.TimeoutExpired after ``limit_s``, when the command has been killed.
    """
    paths = [REPOSITORY / "tests" / "support", REPOSITORY, REPOSITORY / "examples", os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, paths))), **(environment or {})}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    how = {"cwd": REPOSITORY, "env": env, "text": True, "errors": "replace", "start_new_session": True}
    process = subprocess.Popen(command, **streams, **how)
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as late:
        print((late.output or b"").decode(errors="replace"), flush=True)
        raise
    finally:
        kill(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(output, flush=True)
    return process.returncode, output


def launched(num_ranks: int, *script: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a script on this node, with torchrun if it has several ranks; return its status and its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return run([sys.executable, *(torchrun if num_ranks > 1 else []), *script], environment)


def kill(pid: int) -> None:
    """Kill a process and its descendants, also those in sessions of their own, such as torchrun's ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
