# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contents of one rank of each pipeline stage, in a world of the real size and without any allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.adapters.low_rank_adapters import adapter_sizes
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.build import build_on_meta


@dataclass(frozen=True)
class Stage:
    """The first rank of a pipeline stage; the stage's other ranks hold as much."""

    pp_rank: int
    dense_parameters: int
    """The parameters on this rank that are reduced over all data-parallel ranks, padding of the vocabulary included."""
    expert_parameters: int
    """The parameters on this rank that are reduced over the ranks with the same experts."""
    model_parameters: int
    """The parameters that all ranks of this stage add to the model, without copies and padding."""
    chunks: tuple[tuple[bool, ...], ...]
    """Whether a layer has experts, per virtual stage and layer."""
    embeds: bool
    projects: bool
    dp_cp_size: int
    """The number of ranks that share the optimizer state of dense parameters."""
    expert_dp_size: int
    """The number of ranks that share the optimizer state of experts."""
    adapter_parameters: int = 0
    """The parameters of the adapters on this rank, the only trained ones where there are any."""
    adapter_model_parameters: int = 0
    """The parameters of the adapters that all ranks of this stage add to the model, without copies."""
    adapter_columns: tuple[tuple[float, ...], ...] = ()
    """The elements per token that the adapters of a layer keep for backward, per virtual stage and layer."""
    teacher_parameters: Mapping[str, int] = field(default_factory=dict)
    """The parameters on this rank of each teacher of the key ``teachers`` that is adapters, by name."""
    teacher_copies: Sequence[Mapping[str, int]] = ()
    """The parameters on this rank of the other teachers by name, those of one architecture together: they share a copy.
    """

    @property
    def parameters(self) -> int:
        """The parameters on this rank."""
        return self.dense_parameters + self.expert_parameters

    @property
    def num_layers(self) -> int:
        """The transformer layers on this rank."""
        return sum(len(chunk) for chunk in self.chunks)


@dataclass(frozen=True)
class PlannedModel:
    """A model in the layout of the run: the student, or a teacher of another architecture."""

    transformer: Any
    """Megatron's configuration of the model."""
    stages: Sequence[Stage]

    @property
    def parameters(self) -> int:
        """The parameters of the whole model."""
        return sum(stage.model_parameters for stage in self.stages)


def stages(
    model: ModelConfig,
    config: TransformerConfig,
    cut: ParallelConfig,
    vocab_size: int,
    world_size: int,
    adapter: AdapterConfig | None = None,
    teachers: Mapping[str, AdapterConfig] | None = None,
) -> list[Stage]:
    """Return one `Stage` per pipeline rank, each built on the meta device as that rank would build it.

    ``config``: Megatron's configuration of the model in the layout ``cut``; ``vocab_size``: the number of tokens
    in the vocabulary, without padding; ``adapter``: the adapters of the model, if it has any; ``teachers``: those of
    each teacher that is adapters.
    Raises: `ConfigError` with Megatron Core's message if Megatron Core refuses the layout.
    """
    found = []
    for pp_rank in range(cut.pipeline_model_parallel_size):
        with ranks.imagined(cut, world_size, pp_rank) as grid:
            try:
                chunks = build_on_meta(model, config, grid, vocab_size)
            except (ValueError, AssertionError, RuntimeError) as error:
                message = " ".join(str(error).split())
                raise ConfigError(f"Megatron Core cannot build pipeline stage {pp_rank}: {message}") from error
            own = [adapter_sizes(chunk, adapter, grid.tp_size) for chunk in chunks] if adapter and adapter.rank else []
            stage = replace(
                _stage(chunks, cut, grid, vocab_size),
                adapter_parameters=sum(size.parameters for size in own),
                adapter_model_parameters=sum(size.model_parameters for size in own),
                adapter_columns=tuple(size.columns for size in own),
                teacher_parameters={
                    name: sum(adapter_sizes(chunk, settings, grid.tp_size).parameters for chunk in chunks)
                    for name, settings in (teachers or {}).items()
                },
            )
            found.append(stage)
    return found


def _stage(chunks: Sequence[GPTModel], cut: ParallelConfig, grid: RankGrid, vocab_size: int) -> Stage:
    dense = experts = unique = 0
    etp = cut.expert_tensor_parallel_size or grid.tp_size
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if not param.is_meta:
                raise RuntimeError(f"{name} was allocated on {param.device} in a dry run")
            if getattr(param, "allreduce", True):
                dense += param.numel()
            else:
                experts += param.numel()
            is_copy = name.endswith("output_layer.weight") and chunk.share_embeddings_and_output_weights
            if is_copy and not chunk.pre_process:  # the last stage's copy of the embedding
                continue
            of_expert = ".mlp.experts." in name
            cuts = (etp if of_expert else grid.tp_size) if getattr(param, "tensor_model_parallel", False) else 1
            unique += param.numel() * cuts * (grid.ep_size if of_expert else 1)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                unique -= (param.size(0) * cuts - vocab_size) * param.size(1)
    return Stage(
        pp_rank=grid.pp_rank,
        dense_parameters=dense,
        expert_parameters=experts,
        model_parameters=unique,
        chunks=tuple(tuple(isinstance(layer.mlp, MoELayer) for layer in chunk.decoder.layers) for chunk in chunks),
        embeds=any(chunk.pre_process for chunk in chunks),
        projects=any(chunk.post_process for chunk in chunks),
        dp_cp_size=grid.dp_cp_group.size(),
        expert_dp_size=grid.world_size // (etp * grid.ep_size * grid.pp_size),
    )
