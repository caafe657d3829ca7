# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""All ranks of a launch compute one proof after the other; a rank that raises or hangs ends the launch by its name.

The ranks exchange their reports through a store and never through a collective, because a collective would hang, too.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.roll_call import launch_store

_POLL_S, _WATCH_S = 0.05, 0.25


@dataclass(frozen=True)
class WorstError:
    """The worst error of a proof, over its cases or over the ranks."""

    error: float
    """The error as a share of the allowed error; NaN counts as the worst."""
    case: str
    """The case with this error."""

    @property
    def holds(self) -> bool:
        """Whether the error is an allowed one."""
        return self.error <= 1

    @classmethod
    def worst(cls, reports: list[WorstError]) -> WorstError:
        """Return the report with the largest error."""
        return max(reports, key=lambda report: report.error if report.error == report.error else float("inf"))


class Meeting:
    """The ranks of one launch during all proofs, and the thread of each rank that ends a launch that cannot go on."""

    def __init__(self, rank: int, world_size: int, limit_s: float) -> None:
        """Connect this rank to the store of the launch, which rank 0 opens without torchrun."""
        self.rank, self.world_size, self._limit_s = rank, world_size, limit_s
        self._server = launch_store("selfdistill/selftest", world_size, limit_s + 60, may_keep=rank == 0)
        self._store = self._server if world_size == 1 else launch_store("selfdistill/selftest", world_size, 60)
        self._lock = threading.Lock()  # of the store's connection
        self._num_groups, self._num_proofs, self._proof, self._began = 0, 0, "", 0.0
        self._closing = threading.Event()

    def __enter__(self) -> Meeting:
        threading.Thread(target=self._watch, name="self-test watch", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        if self.rank == 0 and self.world_size > 1:
            time.sleep(4 * _WATCH_S)  # the other ranks read the store, which this process may keep

    def hold(self, name: str, proof: Callable[[], WorstError]) -> WorstError:
        """Run ``proof()`` on all ranks and end the process groups that it has opened; return the worst report.

        The report is equal on all ranks.  An exception on any rank ends the launch with the message of this rank.
        """
        self._num_proofs += 1
        self._began, self._proof = time.monotonic(), name
        try:
            self._publish("report", json.dumps(asdict(proof())))
            with self._lock:
                if self._store.add(f"{self._num_proofs} reports", 1) == self.world_size:
                    self._store.set(f"{self._num_proofs} complete", "")
            while not self._has(f"{self._num_proofs} complete"):  # no rank closes connections that another rank reads
                time.sleep(_POLL_S)
            ranks.shutdown()
        except Exception as error:
            with self._lock:
                if self._store.add("failures", 1) == 1:  # the message of the first rank alone
                    self._store.set("failure", f"rank {self.rank}: {type(error).__name__}: {error}")
            threading.Event().wait()  # the watch ends this process
        return WorstError.worst([WorstError(**json.loads(report)) for report in self._published("report").values()])

    def phase(self, name: str) -> None:
        """Publish the phase of the proof that this rank begins, for the message about ranks that do not return."""
        self._publish("phase", name)

    def grid(self, layout: ParallelConfig, *, alone: bool = False) -> RankGrid:
        """Open a new process group over all ranks, or of this rank ``alone``, and the groups of ``layout`` in it."""
        self.phase("opening the groups of the layout")
        self._num_groups += 1
        prefix = f"group {self._num_groups}" + (f" of rank {self.rank}" if alone else "")
        dist.init_process_group(
            "gloo" if cpu.ON_CPU else "nccl",
            store=dist.PrefixStore(prefix, self._server),
            rank=0 if alone else self.rank,
            world_size=1 if alone else self.world_size,
            timeout=timedelta(seconds=self._limit_s + 120),  # NCCL ends the process then: the watch must do so before
        )
        return ranks.initialize(layout, seed=1)

    def _publish(self, what: str, value: str) -> None:
        with self._lock:
            self._store.set(f"{self._num_proofs} {what} {self.rank}", value)

    def _has(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))

    def _published(self, what: str) -> dict[int, str]:
        """Return the ranks that have published ``what`` in the present proof, with their values."""
        keys = {rank: f"{self._num_proofs} {what} {rank}" for rank in range(self.world_size)}
        with self._lock:
            return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def _watch(self) -> None:
        """End this process if the launch cannot go on; runs in a thread, as the main thread may hang."""
        while not self._closing.wait(_WATCH_S):
            try:
                ended = self._has("ended")
                message = None if ended else self._trouble()
                if message is not None:
                    print(f"FAILURE  {self._proof}: {message}", flush=True)
                    ended = True
                    with self._lock:
                        self._store.set("ended", "")
                    time.sleep(4 * _WATCH_S)  # the other ranks read the store, which this process may keep
            except RuntimeError:  # torch's DistError: the process with the store is gone, and with it the launch
                ended = True
            if ended:
                os._exit(1)

    def _trouble(self) -> str | None:
        """Return the reason why the proof cannot end, with the ranks that are to blame; None without one."""
        if self.rank == 0 and self._has("failure"):
            with self._lock:
                return str(self._store.get("failure").decode())
        # The first ranks look first, so one rank speaks, even if rank 0 hangs.
        if not self._num_proofs or time.monotonic() - self._began <= self._limit_s + min(self.rank, 20):
            return None
        reported, phases = self._published("report"), self._published("phase")
        missing = [rank for rank in range(self.world_size) if rank not in reported]
        where = "; ".join(f"rank {rank} at: {phases.get(rank, 'its start')}" for rank in missing)
        message = f"not all ranks have returned within {self._limit_s:.0f} s (--minutes gives them more): {where}"
        return message if missing else None
