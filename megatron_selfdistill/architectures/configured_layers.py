# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers of a model's rarer architecture in the layer spec of a chunk, and what these layers do not compute."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as MegatronGatedDeltaNet
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.architectures.attention_variants import VariantAttention as VariantAttention
from megatron_selfdistill.architectures.attention_variants import window_faults
from megatron_selfdistill.architectures.flash_sinks import FlashSinkAttention, sink_faults
from megatron_selfdistill.architectures.gated_delta_net import place_gated_delta_nets
from megatron_selfdistill.architectures.rare_layers import (
    AllHeadsNormAttention,
    BiasedExpertOutput,
    LatentRMSNorm,
    with_latent_epsilon,
)
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.known_faults import Fault, has_sinks
from megatron_selfdistill.model.layers import ALL_HEADS, RMSNorm


def place_layers(
    block: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool
) -> None:
    """Put the layers of this annex that ``config`` asks for into ``block``, the layer specs of a chunk of this rank.

    ``transformer_engine``: whether the layers of ``block`` are Transformer Engine's.
    """
    for spec in block.layer_specs:
        _complete_layer(spec, config, transformer_engine)
    place_gated_delta_nets(block, config, vp_stage, transformer_engine=transformer_engine)


def _complete_layer(spec: ModuleSpec, config: TransformerConfig, transformer_engine: bool) -> None:
    attention = spec.submodules.self_attention
    if hasattr(config, "latent_layernorm_epsilon"):
        if transformer_engine:
            for name in ("linear_q_up_proj", "linear_kv_up_proj"):
                setattr(attention.submodules, name, with_latent_epsilon(getattr(attention.submodules, name)))
        else:
            for name in ("q_layernorm", "kv_layernorm"):
                if getattr(attention.submodules, name) is RMSNorm:
                    setattr(attention.submodules, name, LatentRMSNorm)
    if has_sinks(config) and transformer_engine:
        attention.submodules.core_attention = FlashSinkAttention
    if hasattr(config, ALL_HEADS):
        # config.qk_layernorm stays false: with it, Megatron sums the gradients of all norms of queries and keys over
        # TP, and the weights of these norms are cut.
        attention.module = AllHeadsNormAttention
    experts = getattr(older_megatron.submodules_of(spec.submodules.mlp), "experts", None)
    if experts is not None and config.add_bias_linear and not transformer_engine:
        older_megatron.submodules_of(experts).linear_fc2 = BiasedExpertOutput


def set_attributes(config: TransformerConfig, model: ModelConfig) -> None:
    """Set YaRN's attributes on ``config``, the epsilon of latents and the norms of all heads, where ``model`` has them.

    Raises: `ConfigError` for values that do not fit the rest of the model or the layout.
    """
    if model.position_embedding_type == "yarn":  # Megatron Core's ``GPTModel`` and ``Attention`` read the attributes
        if config.multi_latent_attention:
            raise ConfigError(
                "model.position_embedding_type=yarn is for ordinary attention: latent attention has its own YaRN, "
                "model.transformer.rope_type=yarn"
            )
        original, parts = model.yarn.original_max_position_embeddings, 2 * config.context_parallel_size
        if config.context_parallel_size > 1 and original % parts:
            raise ConfigError(
                f"model.yarn.original_max_position_embeddings={original} must be a multiple of {parts}, twice "
                "parallel.context_parallel_size: Megatron Core cuts a table of this length"
            )
        for name, value in dataclasses.asdict(model.yarn).items():
            setattr(config, f"yarn_{name}", value)
    if model.latent_layernorm_epsilon is not None:  # `LatentRMSNorm` and `with_latent_epsilon` read the attribute
        config.latent_layernorm_epsilon = model.latent_layernorm_epsilon
    if model.qk_layernorm_all_heads:
        setattr(config, ALL_HEADS, True)


def layer_faults(config: TransformerConfig, *, transformer_engine: bool) -> list[Fault]:
    """Return what the layers of this annex do not compute, and whether ``config`` has it.

    ``transformer_engine``: whether the other layers are Transformer Engine's.
    """
    normalised, tp = hasattr(config, ALL_HEADS), config.tensor_model_parallel_size
    return [
        *window_faults(config, transformer_engine=transformer_engine),
        *sink_faults(config, transformer_engine=transformer_engine),
        (
            config.experimental_attention_variant not in (None, "gated_delta_net"),
            "experimental_attention_variant has layers here for gated_delta_net only: leave it null",
        ),
        (
            config.experimental_attention_variant == "gated_delta_net" and config.activation_func is not F.silu,
            "a gated delta net computes with silu: set model.activation=silu",
        ),
        (
            config.experimental_attention_variant == "gated_delta_net" and config.context_parallel_size > 1,
            "Gated delta net does not support context parallelism here: set parallel.context_parallel_size=1",
        ),
        (
            normalised and (config.multi_latent_attention or config.normalization != "RMSNorm"),
            "qk_layernorm_all_heads is an RMSNorm of ordinary attention: set model.normalization=RMSNorm, and leave "
            "model.transformer.multi_latent_attention false",
        ),
        (
            normalised and config.num_query_groups % tp != 0,
            f"qk_layernorm_all_heads counts each key once, but {config.num_query_groups} query groups on {tp} "
            "tensor-parallel ranks are copied: lower parallel.tensor_model_parallel_size",
        ),
    ]


def refuse_provided_layers(chunk: torch.nn.Module) -> None:
    """Raise `ConfigError` if the model of ``model.provider`` has gated delta nets of Megatron Core."""
    if any(isinstance(module, MegatronGatedDeltaNet) for module in chunk.modules()):
        raise ConfigError(
            "model.provider: expected gated delta nets of model.architecture.layer_spec, got those of Megatron Core, "
            "which take no packed sequences"
        )
