# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Count the unfinished sequences of a batch, without making the host wait for the pass that the device computes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def lag_of(device: torch.device) -> int:
    """Return the number of passes by which the host's count of unfinished sequences is late."""
    return 1 if device.type == "cuda" else 0


class Survivors:
    """The number of unfinished sequences of a batch that is decoded token by token.

    On a GPU the number comes one pass late: the host queues a pass while the device computes the pass before, at the
    price of one additional pass at the end of a batch.  All ranks that decode the same batch get the same numbers.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._lag = lag_of(device)
        self._pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def after_pass(self, unfinished: Tensor) -> tuple[int, Tensor | None]:
        """Return the number of sequences that are known to go on, and the rows ``[n]`` that the caller shall keep.

        ``unfinished [rows]`` bool: the sequences that go on after this pass.  The rows are None while more than half of
        the sequences go on: the survivors of a long tail should not pay for the rest.  The next call has the kept rows
        only.
        """
        count = unfinished.sum()
        if unfinished.device.type == "cuda":
            on_host = torch.empty(count.shape, dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((unfinished, on_host, event))
        else:
            self._pending.append((unfinished, count, None))
        if len(self._pending) <= self._lag:
            return self._num_rows, None
        known, number, passed = self._pending.popleft()
        if passed is not None:
            passed.synchronize()
        num_known = int(number)
        if 2 * num_known > self._num_rows or not num_known:
            return num_known, None
        rows = torch.argsort((~known).to(torch.uint8), stable=True)[:num_known]  # nonzero would wait for the device
        self._num_rows = num_known
        self._pending = deque((mask[rows], later, event) for mask, later, event in self._pending)
        return num_known, rows
