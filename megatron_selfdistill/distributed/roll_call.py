# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Messages between the ranks of a launch without a process group: all ranks are ready, or one rank has failed.

    ranks = RollCall()
    word = ranks.answer("directory", "ready")      # waits for all ranks and returns the word of rank 0
    ...
    if ranks.failed(message, status):           # releases the other ranks; True on one of the ranks with this message
        print(message)

The ranks communicate through the launch's store: torchrun's own store, or a store that rank 0 keeps.  A world of one
rank waits for nothing and does not import torch.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from megatron_selfdistill.errors import ConfigError

CALLS = ("directory", "inputs")
"""The calls that every rank answers, in this order, before it joins the process group."""
_CONNECT_S = 10.0
_GRACE_S = 10.0  # time for which rank 0 keeps the store open, so that the other ranks can read about a failure
_LOOK_S = 0.1
_launches: Counter[str] = Counter()


def launch_store(prefix: str, world_size: int, timeout_s: float, *, may_keep: bool = False) -> Any:
    """Return a new connection, a ``Store``, to the store of this launch, for keys under ``prefix``.

    The store is at MASTER_ADDR and MASTER_PORT.  torchrun keeps one store for all restarts of a launch, so the keys
    contain the number of the restart.  Without torchrun's store, the rank with ``may_keep`` keeps one in its process.
    A world of one rank gets a store of its own in memory.
    ``timeout_s``: the longest wait for the connection or a key, in seconds.
    """
    import torch.distributed as dist

    launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if world_size == 1:
        return dist.PrefixStore(f"{prefix}/{launch}", dist.HashStore())
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=may_keep and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=timeout_s),
    )
    return dist.PrefixStore(f"{prefix}/{launch}", store)


class OtherRankFailed(Exception):
    """Another rank could not start and has printed why.

    This rank ends with the same status and prints nothing.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank ended with status {status}")
        self.status = status


def world_size() -> int:
    """Return the number of ranks of this launch: ``torchrun``'s WORLD_SIZE, or 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaker() -> str:
    """Return what stands before a message of this rank: ``[rank 1] ``; nothing in a launch of one rank."""
    return f"[rank {os.environ.get('RANK', '0')}] " if world_size() > 1 else ""


def launch(num_ranks: int, arguments: Sequence[str]) -> int:
    """Train with ``arguments`` on ``num_ranks`` ranks of this node, and return the exit status.

    This process is torchrun: it passes signals on to the ranks.  The status is that of the rank that failed first, 0,
    or 128 and the number of the signal that ended the run.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # torchrun's own variable
    ranks = ["--standalone", f"--nproc-per-node={num_ranks}", "-m", "megatron_selfdistill.train", *arguments]
    try:
        torchrun.run(torchrun.parse_args(ranks))
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


class RollCall:
    """The ranks of one run of one launch.  Every rank creates one object for the same run."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), world_size()
        # A process may take part in several runs, one after the other.
        launch = os.environ.get("MASTER_PORT", "")
        self._prefix = f"selfdistill/{launch}/{_launches[launch]}"
        _launches[launch] += 1
        self._alone = self.world_size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        self._store: Any = None

    def answer(self, call: str, word: str = "", timeout_s: float = 1800.0) -> str:
        """Wait until every rank has answered ``call``, one of `CALLS`, and return the word of rank 0.

        Raises: `OtherRankFailed` if a rank calls `failed` instead; `ConfigError` after ``timeout_s`` seconds.
        """
        if self._alone:
            return word
        store = self._connected()
        if self.rank == 0:
            store.set(f"word/{call}", word)
        if store.add(f"answers/{call}", 1) == self.world_size:
            store.set(f"complete/{call}", "")
        try:
            store.wait([f"complete/{call}"], timedelta(seconds=timeout_s))
            if store.check(["failed"]):
                raise OtherRankFailed(int(store.get("failed")))
            return str(store.get(f"word/{call}").decode())
        except RuntimeError as error:  # torch's DistError
            raise ConfigError(
                f"waited {timeout_s:g} s for all {self.world_size} ranks to get ready ({call}): start them together, "
                f"or raise parallel.distributed_timeout_minutes ({str(error).splitlines()[0]})"
            ) from error

    def failed(self, message: str, status: int) -> bool:
        """Inform the other ranks that this rank ends because of ``message``; return whether this rank prints it.

        Each message is printed once, by the first of the ranks that have it.  Ranks that wait in `answer`, or call it
        later, raise `OtherRankFailed`.  This method never raises: it returns True if the store cannot be reached.
        """
        if self._alone:
            return True
        try:
            store = self._connected()
            store.set("failed", str(status))
            for call in CALLS:
                store.set(f"complete/{call}", "")
            digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()
            return bool(store.add(f"printed/{digest}", 1) == 1)
        except RuntimeError:
            return True

    def leave(self) -> None:
        """End this rank's part after a failure; rank 0 waits a few seconds for the other ranks to leave first."""
        if self._alone or self._store is None:
            return
        try:
            left = self._store.add("left", 1)
            deadline = time.monotonic() + _GRACE_S
            while self.rank == 0 and left < self.world_size and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
                left = self._store.add("left", 0)
        except RuntimeError:
            pass  # the process that holds the store has left, so this rank has nobody to wait for
        self._store = None

    def _connected(self) -> Any:
        if self._store is None:
            self._store = launch_store(self._prefix, self.world_size, _CONNECT_S, may_keep=self.rank == 0)
        return self._store
