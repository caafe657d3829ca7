# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Send the weights of one moment from the trainer's rank 0 to several vLLM servers at once, by any transfer.

    update = WeightUpdate(transfer, servers, version)  # on rank 0
    for tensors in exporter.stream(copies=False):      # on every rank
        update.send(tensors)
    update.finish()
    update.failures                                    # servers without a complete update, and why

A server answers no request between the first call and the last, and the version that it reports after an incomplete
update is not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from megatron_selfdistill.rollout.vllm.client import VllmServer
from megatron_selfdistill.rollout.vllm.protocol import digest
from megatron_selfdistill.rollout.vllm.transfer import Failures, Transfer, on_each

LOADING = "loading"
"""Version that a server reports while weights arrive; it is no number, so no response with it is ever used."""


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
        load_factors: Callable[[VllmServer], None] | None = None,
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
        self._thread = ThreadPoolExecutor(
            1, "bucket", initializer=None if device is None else lambda: torch.cuda.set_device(device)
        )
        self._on_its_way: Future[Failures] | None = None
        self._drop(on_each(self.servers, partial(_begin, keeps=keeps)))
        self._drop(transfer.join(self.servers) if self.servers else {})
        if not self.broken:
            self._each(lambda server: server.start_weight_update())

    @property
    def isolated(self) -> bool:
        """Whether a server that fails leaves the update of the other servers complete."""
        return self._transfer.isolated

    @property
    def broken(self) -> bool:
        """Whether no server will get a complete update."""
        return not self.servers or bool(self.failures and not self._transfer.isolated)

    def send(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Send one bucket, which may be empty.

        Returns when its tensors may be overwritten: servers have loaded the bucket before it, and may still be loading
        this bucket, so that the next bucket is gathered and packed meanwhile.
        """
        if self.broken or not tensors:
            return
        bucket = self._transfer.pack(tensors)
        self._settle()
        if self.broken:
            return
        self._names += bucket.layout.names
        self.num_bytes += sum(tensor.nbytes for _, tensor in tensors)
        self._on_its_way = self._thread.submit(self._transfer.send, bucket, list(self.servers))

    def finish(self) -> None:
        """Let servers that got every tensor answer with the new weights from now on."""
        try:
            self._settle()
            self._end()
        finally:
            self._thread.shutdown()
            self._transfer.release()

    def _settle(self) -> None:
        """Wait for the bucket that is on its way."""
        if self._on_its_way is not None:
            sent, self._on_its_way = self._on_its_way, None
            self._drop(sent.result())

    def _end(self) -> None:
        if self.broken:
            return
        complete = digest(self._names)

        def end(server: VllmServer) -> None:
            server.update_weights(complete=complete)
            if self._load_factors is None:
                server.finish_weight_update(str(self._version))
            else:
                server.finish_weight_update(LOADING)
                self._load_factors(server)
                server.set_weight_version(str(self._version))
            server.resume()

        # The transfer itself is over, so a failure here concerns one server only.
        failures = on_each(self.servers, end)
        self.servers = [server for server in self.servers if server not in failures]
        self.failures.update(failures)

    def _each(self, do: Callable[[VllmServer], None]) -> None:
        self._drop(on_each(self.servers, do))

    def _drop(self, failures: Failures) -> None:
        self.failures.update(failures)
        self.servers = [server for server in self.servers if server not in failures]


def _begin(server: VllmServer, keeps: bool) -> None:
    """Stop a server's work, undo an unfinished update of an earlier trainer, and mark the weights as incomplete."""
    server.pause(keeps=keeps)
    server.set_weight_version(LOADING)
    server.call("abandon_weight_update")
