# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A world of ranks in one process, without a network: every rank is a thread, and what ranks send is counted.

    traffic = CountedWorld(layout, num_ranks=1024).run(work)  # calls work(grid) on every rank

The functions of torch.distributed that the code under test calls pass tensors between the threads and count them.  One
thread works at a time, until it waits for another rank, so that a thousand ranks need little memory.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass
class Traffic:
    """What one rank has sent and received."""

    num_bytes: int = 0
    """Bytes that the rank's own tensors hold, sent and received; a collective's way through other ranks is left out."""
    num_messages: int = 0
    """Messages to and from other ranks, of which each collective of equal parts counts as one."""

    def count(self, num_bytes: int, num_messages: int = 1) -> None:
        """Add messages."""
        self.num_bytes += num_bytes
        self.num_messages += num_messages


@dataclass(frozen=True)
class CountedGroup:
    """A process group."""

    ranks: tuple[int, ...]
    """Global ranks, in order."""
    own: int
    """The global rank that asks."""

    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)

    def rank(self) -> int:
        """Return the place of the rank that asks."""
        return self.ranks.index(self.own)


@dataclass
class _Meeting:
    """One collective: the tensor of each rank that has come, and what wakes the ranks that wait for the others."""

    arrived: threading.Condition
    values: dict[int, Any] = field(default_factory=dict)


class CountedWorld:
    """The ranks of one layout, which meet in collectives."""

    def __init__(self, layout: ParallelConfig, num_ranks: int) -> None:
        """Begin a world; raise ValueError if ``num_ranks`` do not hold whole replicas of ``layout``."""
        self._sizes = (
            layout.tensor_model_parallel_size,
            layout.context_parallel_size,
            layout.pipeline_model_parallel_size,
        )
        tp, cp, pp = self._sizes
        if num_ranks % (tp * cp * pp):
            raise ValueError(f"a replica has {tp * cp * pp} ranks, of which {num_ranks} ranks are no multiple")
        self.num_ranks, self.dp_size = num_ranks, num_ranks // (tp * cp * pp)
        self._traffic = [Traffic() for _ in range(num_ranks)]
        self._turn = threading.Lock()
        self._here = threading.local()
        self._meetings: dict[tuple[Any, int], _Meeting] = {}
        self._num_calls: defaultdict[tuple[int, Any], int] = defaultdict(int)
        self._mailboxes: defaultdict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._mail = [threading.Condition(self._turn) for _ in range(num_ranks)]
        self._error: BaseException | None = None

    def run(self, work: Callable[[RankGrid], object]) -> list[Traffic]:
        """Call ``work`` on every rank, and return what each has sent and received; raise what a rank raises."""
        threads = [threading.Thread(target=self._work, args=(work, rank)) for rank in range(self.num_ranks)]
        with self._in_place_of_torch():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        assert not any(self._mailboxes.values()), "a message was sent that no rank has received"
        return self._traffic

    def grid(self, rank: int) -> RankGrid:
        """Return the place of a rank, whose axes are TP, CP, DP and PP, of which TP is the fastest."""
        tp, cp, pp = self._sizes
        sizes = (tp, cp, self.dp_size, pp)
        strides = (1, tp, tp * cp, tp * cp * self.dp_size)

        def group(*axes: int) -> Any:
            ranks = [rank - sum(rank // strides[axis] % sizes[axis] * strides[axis] for axis in axes)]
            for axis in axes:
                ranks = [first + strides[axis] * i for i in range(sizes[axis]) for first in ranks]
            return CountedGroup(tuple(ranks), rank)

        return RankGrid(
            rank=rank,
            world_size=self.num_ranks,
            device=torch.device("cpu"),
            tp_group=group(0),
            cp_group=group(1),
            dp_group=group(2),
            pp_group=group(3),
            dp_cp_group=group(1, 2),
            ep_group=group(),
            virtual_pipeline_model_parallel_size=None,
            sequence_parallel=False,
        )

    # -- in place of torch.distributed -------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        """Reduce to the maximum, the only operation of the exchange."""
        assert op == dist.ReduceOp.MAX
        self._own.count(2 * tensor.nbytes)
        tensor.copy_(torch.stack(list(self._meet(group, tensor.clone()).values())).amax(0))

    def broadcast(self, tensor: Tensor, src: int, group: Any = None) -> None:
        """Copy the tensor of the global rank ``src``."""
        self._own.count(tensor.nbytes)
        tensor.copy_(self._meet(group, tensor.clone() if self._rank == src else None)[src])

    def all_gather_object(self, found: list[Any], value: Any, group: Any = None) -> None:
        """Fill ``found`` with the pickled value of each rank, all of which travel at the length of the longest."""
        values = self._meet(group, (copy.deepcopy(value), len(pickle.dumps(value))))
        self._own.count(len(values) * max(size for _, size in values.values()))
        found[:] = [copy.deepcopy(values[rank][0]) for rank in sorted(values)]

    def batch_isend_irecv(self, batch: Sequence[Any]) -> list[Any]:
        """Send and receive at once; the result holds nothing to wait for."""
        for op, tensor, peer in batch:
            if op is dist.isend:
                self._own.count(tensor.nbytes)
                self._mailboxes[self._rank, peer].append(tensor.clone())
                self._mail[peer].notify_all()
        for op, tensor, peer in batch:
            if op is dist.irecv:
                mailbox = self._mailboxes[peer, self._rank]
                self._wait(self._mail[self._rank], partial(bool, mailbox))
                tensor.copy_(mailbox.popleft())
                self._own.count(tensor.nbytes)
        return []

    # ----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_place_of_torch(self) -> Iterator[None]:
        """Let torch.distributed be this world."""
        with mock.patch.multiple(
            dist,
            get_rank=lambda group=None: self._rank,
            get_world_size=lambda group=None: self.num_ranks if group is None else group.size(),
            get_global_rank=lambda group, place: group.ranks[place],
            get_backend=lambda: "gloo",
            is_initialized=lambda: True,
            P2POp=lambda op, tensor, peer: (op, tensor, peer),
            all_reduce=self.all_reduce,
            broadcast=self.broadcast,
            all_gather_object=self.all_gather_object,
            batch_isend_irecv=self.batch_isend_irecv,
        ):
            yield

    @property
    def _rank(self) -> int:
        rank: int = self._here.rank
        return rank

    @property
    def _own(self) -> Traffic:
        return self._traffic[self._rank]

    def _work(self, work: Callable[[RankGrid], object], rank: int) -> None:
        self._here.rank = rank
        with self._turn:
            try:
                if self._error is None:
                    work(self.grid(rank))
            except BaseException as error:
                self._error = self._error or error
                for waiting in (*self._mail, *(meeting.arrived for meeting in self._meetings.values())):
                    waiting.notify_all()

    def _meet(self, group: Any, value: Any) -> dict[int, Any]:
        """Return the values of all ranks of a group, by global rank, once they have come."""
        members = range(self.num_ranks) if group is None else group.ranks
        self._num_calls[self._rank, members] += 1
        key = members, self._num_calls[self._rank, members]
        meeting = self._meetings.setdefault(key, _Meeting(threading.Condition(self._turn)))
        meeting.values[self._rank] = value
        if len(meeting.values) == len(members):
            del self._meetings[key]
            meeting.arrived.notify_all()
        self._wait(meeting.arrived, lambda: len(meeting.values) == len(members))
        return meeting.values

    def _wait(self, condition: threading.Condition, is_there: Callable[[], bool]) -> None:
        """Let other ranks work until something is there."""
        condition.wait_for(lambda: is_there() or self._error is not None)
        if self._error is not None:
            raise RuntimeError("another rank has failed")
