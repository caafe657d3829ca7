# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tensors that engines need: all weights at each update, or frozen weights once and then factors of adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.adapter_rules import adapter_rules, is_adapter_key
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model.forward import unwrapped


class EngineWeights:
    """The streams of a live model to engines; see `Exporter` for ``chunks``, ``bucket_bytes`` and ``on_ranks``.

    ``rules``: the rules of the weights, without adapters.  ``adapter``: the adapters of the chunks; None or rank 0
    stands for a model without any.
    Raises: `ConfigError` as `Exporter` does, and for adapters that vLLM does not take.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        grid: RankGrid,
        rules: Sequence[Rule],
        adapter: AdapterConfig | None = None,
        *,
        bucket_bytes: int,
        on_ranks: Collection[int] | None = None,
    ) -> None:
        self.adapter: EngineAdapter | None = None
        """The adapters as an engine takes them; None for a model without any."""
        self.transformer: Any = unwrapped(chunks[0]).config
        """Megatron's configuration of the chunks, in whose ``params_dtype`` engines compute."""
        self._factors: Exporter | None = None
        exporter = partial(Exporter, chunks, grid, bucket_bytes=bucket_bytes, on_ranks=on_ranks)
        if adapter is not None and adapter.rank:
            factors = adapter_rules(rules, adapter)
            self.adapter = EngineAdapter.of(adapter, factors)
            self._factors = exporter(factors, part=is_adapter_key)
        self._weights = exporter(rules, part=lambda key: not is_adapter_key(key))

    def stream(self, first: int = 0) -> Iterator[list[tuple[str, Tensor]]]:
        """Return the stream of the weights, without adapters: `Exporter.stream` with views where possible."""
        return self._weights.stream(first)

    def stream_factors(self, first: int = 0) -> Iterator[list[tuple[str, Tensor]]]:
        """Return the stream of the factors of the adapters, by PEFT's names: as `stream`."""
        assert self._factors is not None, "the model has no adapters"
        return self._factors.stream(first)
