# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gloo ranks that run test functions, forked from a process that starts once per session: the fixture ``ranks``.

    def sum_of_ranks(start):                       # module level: the ranks import it by file and name
        value = torch.tensor(start + dist.get_rank())
        dist.all_reduce(value)
        return value.item()

    def test_all_reduce_sums_over_ranks(ranks):
        assert ranks.run(sum_of_ranks, 10, world_size=2) == [21, 21]

Importing torch and megatron-core takes seconds, so one server process imports them and forks the ranks
(rank_worker.py).  Each call has processes, a process group and an environment of its own, which end with the call:
nothing that a function changes reaches another call.  A rank costs about 12 milliseconds, and with the groups of
Megatron Core about 30.  What a function prints is shown when it fails.  The ranks never see a GPU; tests marked ``gpu``
do their work in pytest's own process.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import rank_worker
from ports import free_port

MAX_WORLD_SIZE = 8
# After one rank has failed, how long the others may take to notice before they are killed.
_GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """A function failed, died or hung on a rank; the message holds that rank's traceback or stack."""


class RankPool:
    """A server that imports ``preloaded`` once, and then forks up to `MAX_WORLD_SIZE` gloo ranks for each call."""

    def __init__(
        self, preloaded: Sequence[str] = rank_worker.PRELOADED, environment: Mapping[str, str] | None = None
    ) -> None:
        self._preloaded, self._environment = tuple(preloaded), dict(environment or {})
        self._directory = Path(tempfile.mkdtemp(prefix="selfdistill_ranks_"))
        self._num_calls = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._requests: connection.Connection | None = None
        atexit.register(self.close)

    def run(
        self, fn: Callable[..., Any], *args: Any, world_size: int, timeout=120.0, init_process_group=True, **kwargs: Any
    ) -> list[Any]:
        """Return ``[fn(*args, **kwargs) on rank r for r in range(world_size)]``, called in a gloo group of that size.

        ``fn`` is a function at the top of an importable file; arguments and results are pickled, never
        shared.  Every rank starts with torch.manual_seed(1234), one thread, and RANK, LOCAL_RANK, WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT set as torchrun sets them.  With ``init_process_group=False`` the function
        makes the group.

        Raises: RankError naming the rank, with its traceback, or after ``timeout`` seconds the stack of each
        rank that hangs; `pytest.skip` inside ``fn`` skips the test.  A process with a nice value waits longer, since
        others take its time: Linux gives it a share that is 1.25 times smaller for each unit.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"expected a world_size from 1 to {MAX_WORLD_SIZE}, got {world_size}")
        timeout *= 1.25 ** max(os.nice(0), 0)
        if "<" in fn.__qualname__:
            raise ValueError(
                f"expected a function at the top of a module, got {fn.__qualname__}: ranks import it by name"
            )
        self._num_calls += 1
        directory = self._directory / f"call_{self._num_calls}"
        directory.mkdir()
        task = rank_worker.Task(
            *(fn.__module__, sys.modules[fn.__module__].__file__, fn.__qualname__, pickle.dumps((args, kwargs))),
            *(world_size, timeout, _GRACE_SECONDS, init_process_group, str(directory)),
            **{"master_port": free_port(), "sys_path": list(sys.path), "cwd": os.getcwd()},
        )
        try:
            reply = self._reply(task)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return _results(reply, f"{fn.__module__}.{fn.__qualname__}", world_size, timeout)

    def close(self) -> None:
        """End the server and its ranks and remove their files; may be called twice."""
        self._end_server()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _reply(self, task: rank_worker.Task) -> rank_worker.Reply:
        if self._requests is None:
            self._requests = self._start_server()
        try:
            self._requests.send_bytes(pickle.dumps(task))
            reply: rank_worker.Reply = pickle.loads(self._requests.recv_bytes())
            return reply
        except (EOFError, ConnectionError):
            self._end_server()
            log = (self._directory / "server.log").read_text(errors="replace")
            raise RankError(f"the process that forks the ranks has ended by itself:\n{log}") from None
        except BaseException:  # an interruption: the call goes on there, and ends with the server
            self._end_server()
            raise

    def _start_server(self) -> connection.Connection:
        """Start the process that imports torch and megatron-core once, with the environment of its forks."""
        here = Path(__file__).resolve().parent
        paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | rank_worker.ENVIRONMENT | self._environment
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TMPDIR"] = str(self._directory)  # the ranks end without removing temporary files of libraries
        requests, answers = connection.Pipe()
        code = f"import rank_worker; rank_worker.serve({answers.fileno()}, {self._preloaded})"
        with answers, (self._directory / "server.log").open("wb") as log:
            streams = {"pass_fds": [answers.fileno()], "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._server = subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)
        return requests

    def _end_server(self) -> None:
        if self._server is None or self._requests is None:
            return
        self._requests.close()  # the server ends its ranks and itself when its requests do
        try:
            self._server.wait(5.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = self._requests = None


def _results(reply: rank_worker.Reply, name: str, world_size: int, timeout: float) -> list[Any]:
    """Return the ranks' results in order, or raise the error that explains the others: the one that happened first."""
    outcomes, hung = reply.outcomes, reply.stacks
    failures = sorted((outcome.time, rank) for rank, outcome in outcomes.items() if outcome.failed)
    if failures:
        rank = failures[0][1]
        first = outcomes[rank]
        if first.error_name == "Skipped":
            pytest.skip(str(first.error))
        others = [f"rank {r}: {outcomes[r].error_name}" for _, r in failures[1:]]
        others += [f"rank {r}: still waiting, killed" for r in sorted(hung)]
        after = f"\nAfterwards: {'; '.join(others)}" if others else ""
        log = f"\nIts output:\n{first.log}" if first.log else ""
        raise RankError(f"{name} failed on rank {rank} of {world_size}:\n{first.error}{log}{after}")
    if hung:
        stacks = "\n".join(f"rank {rank}:\n{stack}" for rank, stack in sorted(hung.items()))
        raise RankError(
            f"{name} did not finish within {timeout:g} s on rank(s) {sorted(hung)} of {world_size}\n{stacks}"
        )
    return [pickle.loads(outcomes[rank].result) for rank in range(world_size)]
