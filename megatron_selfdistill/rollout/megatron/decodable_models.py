# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a training model must be to decode, the size of its caches, and the attributes that differ while it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.architecture import core_attention_class
from megatron_selfdistill.model.local_attention import CoreAttention


def cache_bytes_per_token(models: Sequence[torch.nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes that ``Attention._allocate_memory`` takes per sequence and position, over this rank's layers."""
    layers = list(attention_layers(models))
    values = sum(m.num_query_groups_per_partition * (m.key_hidden_size + m.val_hidden_size) for m in layers)
    return max(1, int(values) * dtype.itemsize)  # a stage may have no layer


def state_bytes(models: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of the states of recurrent layers per sequence, over this rank's layers."""
    return sum(getattr(m, "state_bytes", 0) for model in models for m in model.modules())


@dataclass(frozen=True)
class Override:
    """The value that ``owner.name`` has while the model decodes."""

    owner: Any
    name: str
    value: Any


def decoding_overrides(models: Sequence[torch.nn.Module], grid: RankGrid) -> list[Override]:
    """Return the attributes in which decoding differs from a training step; found once per model.

    * Sequence parallelism is off: one token per sequence cannot be cut, so each tensor-parallel rank holds full
    activations.  Megatron caches the switch in its linear layers and embeddings, Transformer Engine in its own.

    * Context parallelism is off: each context-parallel rank decodes sequences of its own, so every group that cuts a
    sequence (rotary embedding, attention) becomes a group of one rank.

    * Multi-latent attention does not use its fused rotary embedding, which refuses a KV cache.

    Collectives: none (a group of one needs no other rank).
    """
    modules = [module for model in models for module in model.modules()]
    configs: list[Any] = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
    overrides = []
    if grid.sequence_parallel:
        overrides += [Override(config, "sequence_parallel", False) for config in configs]
        for name in ("sequence_parallel", "reduce_scatter_embeddings"):
            overrides += [Override(m, name, False) for m in modules if getattr(m, name, None) is True]
    if grid.cp_size > 1:
        alone = dist.new_group([grid.rank], use_local_synchronization=True)
        collections = {id(m.pg_collection): m.pg_collection for m in modules if hasattr(m, "pg_collection")}.values()
        overrides += [Override(config, "context_parallel_size", 1) for config in configs]
        overrides += [Override(c, "cp", alone) for c in collections if getattr(c, "cp", None) is not None]
        overrides += [Override(m, "cp_group", alone) for m in modules if getattr(m, "cp_group", None) is not None]
    for config in configs:
        if config.multi_latent_attention and config.apply_rope_fusion:
            overrides.append(Override(config, "apply_rope_fusion", False))
    return overrides


def stand_in_of(layer: Attention) -> CoreAttention:
    """Return this program's attention with the numbers of ``layer``, whose attention over a cache it computes.

    Transformer Engine builds a plan for each number of keys, and its fast attention cannot hide columns.
    """
    made = core_attention_class(layer.config)(
        layer.config,
        layer.layer_number,
        AttnMaskType.causal,
        "self",
        softmax_scale=getattr(layer, "softmax_scale", None) or getattr(layer.config, "softmax_scale", None),
        k_channels=layer.key_hidden_size,
        v_channels=layer.val_hidden_size,
        pg_collection=layer.pg_collection,
    )
    if isinstance(sinks := getattr(layer.core_attention, "softmax_offset", None), torch.nn.Parameter):
        made.softmax_offset = sinks  # both name the sinks alike
    return made


def refuse_undecodable(models: Sequence[GPTModel], grid: RankGrid) -> None:
    """Raise `ConfigError` if Megatron's static KV cache would be wrong for the model, or decode another model."""
    config, attention = models[0].config, list(attention_layers(models))
    refusals = [
        (config.flash_decode, "flash_decode keeps a cache of its own: set model.transformer.flash_decode=false"),
        (
            config.cuda_graph_impl != "none",
            "CUDA graphs fix the shapes that decoding changes: set model.transformer.cuda_graph_impl=none",
        ),
        (
            any(model.position_embedding_type == "mrope" for model in models),
            "multimodal rotary embeddings (mrope) have no KV cache in Megatron Core: sample elsewhere",
        ),
        (
            bool(config.fp8 or config.fp4),
            "fp8 and fp4 layers need token counts that are multiples of 16, decoding has any number: train in bf16",
        ),
        (
            getattr(config, "fine_grained_activation_offloading", False),
            "fine_grained_activation_offloading also acts while decoding: set it to false",
        ),
        (
            getattr(config, "cache_mla_latents", False),
            "cache_mla_latents replaces the weights that are trained: set it to false",
        ),
        (
            any(layer.attn_mask_type != AttnMaskType.causal for layer in attention),
            "the layer spec must say attn_mask_type=causal for self-attention, or prompts would attend ahead",
        ),
    ]
    if config.num_moe_experts is not None:
        refusals += [
            (
                config.moe_router_load_balancing_type == "sinkhorn",
                "sinkhorn routing trains with other experts than it decodes with: use aux_loss or none",
            ),
            (
                bool(config.moe_input_jitter_eps or config.moe_router_force_load_balancing)
                or getattr(config, "moe_router_force_biased", None) is not None,  # since 0.17
                "a random router cannot be sampled from: unset moe_input_jitter_eps, moe_router_force_load_balancing "
                "and moe_router_force_biased",
            ),
            (
                config.moe_token_dispatcher_type == "allgather" and grid.ep_size > 1,
                "the allgather dispatcher needs equal batches on all expert-parallel ranks: "
                "set moe_token_dispatcher_type=alltoall",
            ),
        ]
    for found, message in refusals:
        if found:
            raise ConfigError(f"this model cannot be sampled in process: {message}")


def attention_layers(models: Sequence[torch.nn.Module]) -> Iterator[Attention]:
    """Yield the layers of attention, all of which have a KV cache."""
    return (module for model in models for module in model.modules() if isinstance(module, Attention))
