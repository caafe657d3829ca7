# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Send the weights of one moment from the trainer's rank 0 to several vLLM servers at once, by any transfer.

    update = WeightUpdate(transfer, servers, version)  # on rank 0; None on the other ranks
    send_buckets(weights.stream, update, patience_s)   # on every rank
    update.finish()                                    # on rank 0
    update.failures                                    # servers without a complete update, and why

A server answers no request between the first call and the last, and the version that it reports after an incomplete
update is not a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron_selfdistill.distributed.collectives import run_long_on_rank_0, run_on_rank_0
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import Work
from megatron_selfdistill.engines.vllm.protocol import digest
from megatron_selfdistill.engines.vllm.server_pool import Failures, on_each
from megatron_selfdistill.engines.vllm.transfer import Transfer
from megatron_selfdistill.errors import EngineError

LOADING = "loading"
"""Version that a server reports while weights arrive; it is no number, so no response with it is ever used."""

AGREEMENT_BUCKETS = 16
"""Number of buckets that the ranks export between two agreements on how the update is going."""

Buckets = Iterator[list[tuple[str, Tensor]]]


class WeightUpdate:
    """The weights of one moment on their way to several servers at once.

    ``servers`` still take part, ``failures`` are the servers that do not.  Where the transfer is not ``isolated``, one
    failure ends the update of all servers: `broken` is then true, and the other servers need a new update.
    """

    def __init__(
        self,
        transfer: Transfer,
        servers: Sequence[VllmServer],
        version: int,
        load_factors: Callable[[VllmServer], Work[None]] | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        """Begin an update.

        ``load_factors`` lets a server take the factors of adapters that have arrived, if any.  ``keeps``: whether
        requests that servers work on go on after the update, with the new weights.
        """
        self._transfer, self._load_factors = transfer, load_factors
        self._version = version
        self._names: list[str] = []
        self.servers = list(servers)
        self.failures: Failures = {}
        self.num_bytes = 0
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "bucket", initializer=partial(_enter_own_stream, device))
        self._on_its_way: Future[Failures] | None = None
        self._drop(on_each(self.servers, partial(_begin, keeps=keeps)))
        self._drop(transfer.join(self.servers) if self.servers else {})
        if not self.broken:
            self._drop(on_each(self.servers, lambda server: server.start_weight_update()))

    @property
    def broken(self) -> bool:
        """Whether no server will get a complete update."""
        return not self.servers or bool(self.failures and not self._transfer.isolated)

    def send(self, tensors: Sequence[tuple[str, Tensor]], deadline: float = math.inf) -> bool:
        """Send one bucket, which may be empty, and return whether it was taken.

        Returns when its tensors may be overwritten: servers have loaded the bucket before it, and may still be loading
        this bucket, so that the next bucket is gathered and packed meanwhile.  The bucket is not taken if servers still
        load the bucket before it at ``deadline``, a time of ``time.monotonic()``; `settle` comes before it is sent
        again.
        """
        if self.broken or not tensors:
            return True
        bucket = self._transfer.pack(tensors)
        packed = _end_of_queued_work()
        if not self.settle(deadline):
            return False
        if not self.broken:
            self._names += bucket.layout.names
            self.num_bytes += sum(tensor.nbytes for _, tensor in tensors)
            servers = list(self.servers)

            def deliver() -> Failures:
                packed()
                return self._transfer.send(bucket, servers)

            self._on_its_way = self._thread.submit(deliver)
        return True

    def settle(self, deadline: float = math.inf) -> bool:
        """Wait until the bucket that is on its way is loaded, but not beyond ``deadline``; return whether it is."""
        if self._on_its_way is not None:
            left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if wait([self._on_its_way], left).not_done:
                return False
            sent, self._on_its_way = self._on_its_way, None
            self._drop(sent.result())
        return True

    def finish(self) -> None:
        """Let servers that got every tensor answer with the new weights from now on."""
        with self._thread:
            self.settle()
            if not self.broken:
                # The transfer itself is over, so a failure here concerns one server only.
                self._drop(on_each(self.servers, partial(self._end, digest(self._names))))

    async def _end(self, complete: str, server: VllmServer) -> None:
        await server.update_weights(complete=complete)
        if self._load_factors is None:
            await server.finish_weight_update(str(self._version))
        else:
            await server.finish_weight_update(LOADING)
            await self._load_factors(server)
            await server.set_weight_version(str(self._version))
        await server.resume()

    def _drop(self, failures: Failures) -> None:
        self.failures.update(failures)
        self.servers = [server for server in self.servers if server not in failures]


def send_buckets(stream: Callable[[int], Buckets], update: WeightUpdate | None, patience_s: float) -> None:
    """Send all buckets of ``stream`` in their order, each of them once.

    ``stream(first)`` yields the buckets from number ``first`` on, as `Exporter.stream` does: every rank of the world
    iterates, and only rank 0 needs the tensors.  ``update``: rank 0's update; None on the other ranks.

    The ranks export a bucket while servers load the bucket before it.  On rank 0 the full tensors of one bucket and two
    packed buckets exist at a time.  Between two agreements the other ranks wait for rank 0 in the collectives of
    ``stream`` only, and rank 0 waits for servers for ``patience_s`` in sum.  After that time rank 0 takes no more
    buckets, and all ranks export these buckets again once the servers have loaded the bucket that is on its way.

    Collectives: those of ``stream``; a broadcast from rank 0 after every `AGREEMENT_BUCKETS` buckets and at the end;
    `run_long_on_rank_0` where rank 0 took no more buckets.  If no server takes part any more, the export ends at the
    next agreement.  Raises: at the next agreement, on all ranks alike, what `WeightUpdate.send` raises on rank 0.
    """
    first, ended = 0, False
    buckets = stream(first)
    while not ended:
        num_exported, num_taken = _send_some(buckets, update, time.monotonic() + patience_s)
        if num_taken is None:
            break
        first += num_taken
        ended = num_taken == num_exported < AGREEMENT_BUCKETS
        if num_taken < num_exported:
            run_long_on_rank_0(lambda: None if update is None else update.settle(), EngineError)
            buckets = stream(first)


def _send_some(buckets: Buckets, update: WeightUpdate | None, deadline: float) -> tuple[int, int | None]:
    """Export the buckets up to the next agreement; on rank 0 an error or a late server ends the sending.

    Return, on every rank, the numbers of the buckets that were exported and taken; the latter is None if no server
    takes part.
    """
    num_exported = num_taken = 0
    error: Exception | None = None
    for tensors in islice(buckets, AGREEMENT_BUCKETS):
        if update is not None and error is None and num_taken == num_exported:
            try:
                num_taken += update.send(tensors, deadline)
            except Exception as raised:
                error = raised
        num_exported += 1

    def agreed() -> int | None:
        assert update is not None, "rank 0 has an update"
        if error is not None:
            raise error
        return None if update.broken else num_taken

    return num_exported, run_on_rank_0(agreed, EngineError)


async def _begin(server: VllmServer, keeps: bool) -> None:
    """Stop a server's work, undo an unfinished update of an earlier trainer, and mark the weights as incomplete."""
    await server.pause(keeps=keeps)
    await server.set_weight_version(LOADING)
    await server.call_all("abandon_weight_update")


def _enter_own_stream(device: int | None) -> None:
    """Let this thread queue work on a stream of its own, which does not wait for the export of the next bucket."""
    if device is not None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())


def _end_of_queued_work() -> Callable[[], None]:
    """Return a function that waits until the GPU has done what this thread has queued so far; nothing on a CPU."""
    if not torch.cuda.is_available():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
