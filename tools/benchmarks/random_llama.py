# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A dense Llama with random weights for the measuring scripts, and the samplers that have its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig, ScheduleConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.interop.hf.mapping import family_of_model
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks


@dataclass(frozen=True)
class RandomLlama:
    """The architecture of a Llama, from which each call builds chunks with other random weights."""

    model: ModelConfig
    optimizer: OptimizerConfig
    transformer: Any
    """Megatron's configuration of the transformer."""
    grid: RankGrid
    vocab_size: int

    @classmethod
    def of(
        cls, cuts: ParallelConfig, grid: RankGrid, vocab_size: int, *, precision: str | None = None, **architecture: Any
    ) -> RandomLlama:
        """Return a Llama with these fields of `ModelConfig`.

        Heads have 64 values unless ``num_attention_heads`` is given.  ``precision``: by default bf16 on a GPU and fp32
        on a CPU.
        """
        heads = {"num_attention_heads": architecture["hidden_size"] // 64, "max_position_embeddings": 4096}
        model = ModelConfig(vocab_size=vocab_size, **heads | architecture)
        optimizer = OptimizerConfig(precision=precision or ("bf16" if grid.device.type == "cuda" else "fp32"))
        transformer = transformer_config(model, cuts, optimizer, ScheduleConfig())
        return cls(model, optimizer, transformer, grid, vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.transformer.params_dtype
        return dtype

    @property
    def rules(self) -> Sequence[Rule]:
        """The tensors of the model and their Hugging Face names."""
        return family_of_model(self.model).rules(self.model)

    def chunks(self, adapter: AdapterConfig | None = None) -> list[torch.nn.Module]:
        """Return this rank's chunks with new random weights, and with adapters unless the rank of ``adapter`` is 0."""
        chunks = list(build_chunks(self.model, self.transformer, self.grid, self.vocab_size))
        if adapter is not None and adapter.rank:
            add_adapters(chunks, adapter, self.grid)
        return chunks

    @contextmanager
    def hf_directory(self) -> Iterator[Path]:
        """Yield a temporary directory with the config.json of the model."""
        config = family_of_model(self.model).hf_config(self.model, str(self.dtype).removeprefix("torch."))
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "config.json").write_text(json.dumps(config))
            yield Path(name)

    def colocated_sampler(
        self,
        chunks: Sequence[torch.nn.Module],
        rollout: RolloutConfig,
        max_length: int,
        adapter: AdapterConfig | None = None,
    ) -> Any:
        """Return a sampler with vLLM in this process, which gets the weights of ``chunks`` and their ``adapter``."""
        from megatron_selfdistill.engines.vllm.colocated import ColocatedSampler
        from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights

        weights = EngineWeights(chunks, self.grid, self.rules, adapter, bucket_bytes=int(rollout.bucket_mb * 2**20))
        with self.hf_directory() as directory:
            return ColocatedSampler(
                weights, self.grid, directory, rollout, vocab_size=self.vocab_size, max_length=max_length
            )
