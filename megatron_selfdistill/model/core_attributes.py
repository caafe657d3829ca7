# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Set the attributes of a ``TransformerConfig`` that models read although the class has no field for them."""

from __future__ import annotations

import dataclasses

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.head_norms import ALL_HEADS


def set_attributes(config: TransformerConfig, model: ModelConfig) -> None:
    """Set YaRN's attributes on ``config``, the epsilon of latents and the norms of all heads, where ``model`` has them.

    Raises: `ConfigError` for values that do not fit the rest of the model or the layout.
    """
    if model.position_embedding_type == "yarn":
        _set_yarn(config, model)
    if model.latent_layernorm_epsilon is not None:
        _set_latent_epsilon(config, model.latent_layernorm_epsilon)
    if model.qk_layernorm_all_heads:
        setattr(config, ALL_HEADS, True)


def _set_yarn(config: TransformerConfig, model: ModelConfig) -> None:
    """Set the attributes that Megatron Core's ``GPTModel`` and ``Attention`` read."""
    if config.multi_latent_attention:
        raise ConfigError(
            "model.position_embedding_type=yarn is for ordinary attention: latent attention has its own YaRN, "
            "model.transformer.rope_type=yarn"
        )
    original, parts = model.yarn_original_max_position_embeddings, 2 * config.context_parallel_size
    if config.context_parallel_size > 1 and original % parts:
        raise ConfigError(
            f"model.yarn_original_max_position_embeddings={original} must be a multiple of {parts}, twice "
            "parallel.context_parallel_size: Megatron Core cuts a table of this length"
        )
    for field in dataclasses.fields(model):
        if field.name.startswith("yarn_"):
            setattr(config, field.name, getattr(model, field.name))


def _set_latent_epsilon(config: TransformerConfig, epsilon: float) -> None:
    """Set the attribute that `norms.LatentRMSNorm` and `norms.with_latent_epsilon` read."""
    if not (config.multi_latent_attention and config.normalization == "RMSNorm"):
        raise ConfigError(
            "model.latent_layernorm_epsilon is for multi-latent attention with model.normalization=RMSNorm: do not set "
            "it for this model"
        )
    config.latent_layernorm_epsilon = epsilon
