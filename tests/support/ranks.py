# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gloo ranks that start once per test session and run test functions: the fixture ``ranks``.

    def sum_of_ranks(start):                       # module level: the ranks import it by file and name
        value = torch.tensor(start + dist.get_rank())
        dist.all_reduce(value)
        return value.item()

    def test_all_reduce_sums_over_ranks(ranks):
        assert ranks.run(sum_of_ranks, 10, world_size=2) == [21, 21]

Importing torch and megatron-core takes seconds, so one server process imports them and forks the ranks, which
then live for the whole session.  Each call gets a fresh process group and environment, and Megatron's global
state is cleared after it.  What a function replaces by hand stays replaced: use
``pytest.MonkeyPatch.context()`` inside it.  What it prints is shown when it fails.  The ranks never see a
GPU; tests marked ``gpu`` do their work in pytest's own process.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

import pytest
import rank_worker

MAX_WORLD_SIZE = 8
# After one rank has failed, how long the others may take to notice before they are killed.
_GRACE_SECONDS = 5.0
_LOG_TAIL_CHARS = 6000
# Megatron's caches keep some models, and with them process groups of three threads each, alive for as long as a process
# lives; after hundreds of calls those threads would be all that the machine does.
_CALLS_PER_PROCESS = 25


class RankError(AssertionError):
    """A function failed, died or hung on a rank; the message holds that rank's traceback or stack."""


@dataclass
class _Rank:
    process: Any
    requests: connection.Connection
    alive: connection.Connection  # never written to: its end closes when this process dies, however it dies
    log: Path


class RankPool:
    """Up to `MAX_WORLD_SIZE` processes, started when first needed, that run functions as gloo ranks."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._folder = Path(tempfile.mkdtemp(prefix="selfdistill_ranks_"))
        self._ranks: dict[int, _Rank] = {}
        self._num_calls = 0
        self._server_started = False
        # Registered after multiprocessing's own exit hook, so it runs before that one waits for the ranks.
        atexit.register(self.close)

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout: float = 120.0,
        init_process_group: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """``[fn(*args, **kwargs) on rank r for r in range(world_size)]``, in a gloo group of that size.

        ``fn`` is a function at the top of an importable file; arguments and results are pickled, never
        shared.  Every rank starts with torch.manual_seed(1234), one thread, and RANK, LOCAL_RANK, WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT set as torchrun sets them.  With ``init_process_group=False`` the function
        makes the group.

        Raises: RankError naming the rank, with its traceback, or after ``timeout`` seconds the stack of each
        rank that hangs; `pytest.skip` inside ``fn`` skips the test.  Then the ranks are replaced, in 0.1 s.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"expected a world_size from 1 to {MAX_WORLD_SIZE}, got {world_size}")
        request = self._request(fn, args, kwargs, world_size, timeout, init_process_group)
        self._start(world_size)
        for rank in range(world_size):
            self._ranks[rank].log.write_text("")
            self._ranks[rank].requests.send_bytes(request)
        name = f"{fn.__module__}.{fn.__qualname__}"
        outcomes, hung = self._collect(world_size, timeout)
        if self._num_calls % _CALLS_PER_PROCESS == 0:
            for rank in list(self._ranks):
                self._kill(rank)
        return _results(outcomes, hung, name, world_size, timeout)

    def close(self) -> None:
        """End all ranks and remove their files; may be called twice."""
        for rank in list(self._ranks):
            self._ranks[rank].requests.close()  # an idle rank ends when its requests do
            self._kill(rank, wait=1.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _request(self, fn: Callable, args: tuple, kwargs: dict, world_size: int, timeout: float, init: bool) -> bytes:
        if "<" in fn.__qualname__:
            raise ValueError(
                f"expected a function at the top of a module, got {fn.__qualname__}; ranks import it by name"
            )
        self._num_calls += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        task = rank_worker.Task(
            module=fn.__module__,
            file=sys.modules[fn.__module__].__file__,
            qualname=fn.__qualname__,
            arguments=pickle.dumps((args, kwargs)),
            world_size=world_size,
            # Longer than the call's: a rank stuck in a collective shall be found by us, with its stack.
            group_timeout=2 * timeout + 60,
            store=str(self._folder / f"store_{self._num_calls}") if init else None,
            master_port=port,
            sys_path=list(sys.path),
            cwd=os.getcwd(),
        )
        return pickle.dumps(task)

    def _start(self, world_size: int) -> None:
        """Fork the ranks that are missing: all of them the first time, and those of a call that failed."""
        for rank in range(world_size):
            if rank in self._ranks:
                continue
            self._start_server()
            requests, worker_requests = self._context.Pipe()
            worker_alive, alive = self._context.Pipe(duplex=False)
            log = self._folder / f"rank_{rank}.log"
            arguments = (rank, worker_requests, worker_alive, str(log))
            process = self._context.Process(target=rank_worker.serve, args=arguments, name=f"rank {rank}")
            process.start()
            worker_requests.close()
            worker_alive.close()
            self._ranks[rank] = _Rank(process, requests, alive, log)

    def _start_server(self) -> None:
        """Start the process that imports torch and megatron-core once, with the environment of its forks."""
        if self._server_started:
            return
        self._server_started = True
        here = Path(__file__).resolve().parent
        with pytest.MonkeyPatch.context() as patch:
            for name, value in rank_worker.ENVIRONMENT.items():
                patch.setenv(name, value)
            inherited = os.environ.get("PYTHONPATH")
            paths = [str(here), str(here.parents[1]), *([inherited] if inherited else [])]
            patch.setenv("PYTHONPATH", os.pathsep.join(paths))
            self._context.set_forkserver_preload(["rank_worker"])
            forkserver.ensure_running()

    def _collect(self, world_size: int, timeout: float) -> tuple[dict[int, rank_worker.Outcome], dict[int, str]]:
        """Wait until each rank has sent its outcome and is ready again; after a failure kill them all."""
        outcomes: dict[int, rank_worker.Outcome] = {}
        pending = {self._ranks[rank].requests: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        failed = False
        while pending and (left := deadline - time.monotonic()) > 0:
            for ready in connection.wait(list(pending), left):
                rank = pending[ready]
                try:
                    message = pickle.loads(ready.recv_bytes())
                except (EOFError, ConnectionError):
                    outcomes.setdefault(rank, self._death(rank))
                    message = rank_worker.READY
                    self._kill(rank)
                if message == rank_worker.READY:
                    del pending[ready]
                else:
                    outcomes[rank] = message
                if not failed and rank in outcomes and outcomes[rank].failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        hung = self._stacks([rank for rank in pending.values() if rank not in outcomes])
        if failed or pending:
            # All of them, also those that look well: after a peer's death gloo sometimes cannot connect
            # again.
            for rank in self._ranks.keys() & range(world_size):
                self._kill(rank)
        return outcomes, hung

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        for rank in ranks:
            # faulthandler writes the stacks of all threads to the log
            os.kill(self._ranks[rank].process.pid, signal.SIGUSR2)
        if ranks:
            time.sleep(0.5)
        return {rank: self._log_tail(rank) for rank in ranks}

    def _death(self, rank: int) -> rank_worker.Outcome:
        process = self._ranks[rank].process
        process.join(2.0)
        text = f"the process ended with exit code {process.exitcode} (negative: that signal)\n"
        text += self._log_tail(rank)
        # Time 0: its peers see their connection break before we see it end, but it is what explains them.
        return rank_worker.Outcome(0.0, error=text, error_name="died")

    def _log_tail(self, rank: int) -> str:
        return self._ranks[rank].log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]

    def _kill(self, rank: int, wait: float = 0.0) -> None:
        it = self._ranks.pop(rank)
        it.process.join(wait)
        if it.process.is_alive():
            it.process.kill()
        it.process.join(5.0)
        it.requests.close()
        it.alive.close()


def _results(
    outcomes: dict[int, rank_worker.Outcome], hung: dict[int, str], name: str, world_size: int, timeout: float
) -> list[Any]:
    """The ranks' results in order, or the error that explains the others: the one that happened first."""
    failures = sorted((outcome.time, rank) for rank, outcome in outcomes.items() if outcome.failed)
    if failures:
        rank = failures[0][1]
        first = outcomes[rank]
        if first.error_name == "Skipped":
            pytest.skip(first.error)
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
