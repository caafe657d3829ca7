# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Decoding passes as CUDA graphs, which a GPU repeats without the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.model.rotary import forget_tables
from megatron_selfdistill.rollout.megatron.ragged_cache import RaggedCache

COLUMNS = 256
"""The number of columns by which the cache that a recorded pass reads grows."""


class RecordedPasses:
    """The passes of one token per row over a `RaggedCache`, each of which is recorded once and then repeated.

    A GPU computes such a pass in less time than the host needs to queue its kernels.  A CUDA graph queues all of them
    at once, with the shapes and addresses of its recording.  Therefore the attention reads whole multiples of `COLUMNS`
    columns, of which the cache hides those that are not written yet, and the tokens and the columns of the rows change
    in place.  A recording ends where the columns are used up.  Where rows leave the cache, make another object.

    On a CPU the passes have the same shapes and addresses, and nothing is recorded.
    """

    def __init__(self, run: Callable[[Tensor], Tensor | None], cache: RaggedCache) -> None:
        """``run``: returns the logits ``[b, V]`` behind ``tokens [b, 1]``, without waiting for the device."""
        self._run, self._cache = run, cache
        self._repeat: Callable[[], Tensor | None] | None = None
        self._num_columns = 0
        self._tokens = torch.empty_like(cache.columns)[:, None]
        self._pool = torch.cuda.graph_pool_handle() if self._tokens.is_cuda else None
        cache.multiple = COLUMNS

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Return the logits ``[b, V]`` behind ``tokens [b, 1]``, which the next call may overwrite."""
        self._tokens.copy_(tokens)
        if self._repeat is None or self._num_columns != self._cache.num_columns:
            self._repeat, self._num_columns = self._recorded(), self._cache.num_columns
        return self._repeat()

    def _recorded(self) -> Callable[[], Tensor | None]:
        if self._pool is None:
            return lambda: self._run(self._tokens)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        aside = recording.capture_stream  # one for all recordings: cuBLAS keeps memory for each stream
        assert aside is not None
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(self._tokens)  # what libraries prepare in a first call cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        forget_tables()
        with recording:
            logits = self._run(self._tokens)
        forget_tables()

        def repeat() -> Tensor | None:
            beat()
            graph.replay()
            return logits

        return repeat
