# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Describe a model by the arguments of Megatron-LM, which a checkpoint stores.

Megatron-LM reads them with ``--use-checkpoint-args``, and `stored_model` reads them back.

Source: ``megatron/training/arguments.py`` of core_v0.16.1, and ``argument_utils.py`` of 0.19.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
from typing import Any

import torch
import torch.nn.functional as F

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import ModelConfig, YarnConfig
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.fused_kernels import activation_name, quick_gelu
from megatron_selfdistill.model.layers import ALL_HEADS
from megatron_selfdistill.model.model_values import ROPE_FACTOR

YARN = [f"yarn_{field.name}" for field in dataclasses.fields(YarnConfig)]
"""Megatron's names of the fields of `YarnConfig`."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def megatron_args(chunk: torch.nn.Module, model: ModelConfig) -> argparse.Namespace:
    """Return the arguments of Megatron-LM that describe the model of ``chunk``.

    Values come from the live model where possible, so that a model of ``model.provider`` is described too; ``model``
    supplies the values that a ``GPTModel`` does not keep (the factor of the RoPE scaling, the true vocabulary and its
    divisor).  The result holds the plain fields of the ``TransformerConfig``, and the fields that Megatron-LM spells
    differently.

    Source: ``load_args_from_checkpoint`` in Megatron-LM's ``megatron/training/checkpointing.py``.
    """
    gpt = unwrapped(chunk)
    return model_args(
        gpt.config,
        model,
        gpt,
        max_position_embeddings=gpt.max_sequence_length,
        padded_vocab_size=gpt.vocab_size,
        rope_scaling=gpt.rotary_scaling,
        seq_len_interpolation_factor=getattr(
            getattr(gpt, "rotary_pos_emb", None), "seq_len_interpolation_factor", None
        ),
    )


def model_args(
    config: TransformerConfig,
    model: ModelConfig,
    described: Any,
    *,
    max_position_embeddings: int,
    padded_vocab_size: int,
    rope_scaling: bool,
    seq_len_interpolation_factor: float | None,
) -> argparse.Namespace:
    """Return the arguments that describe the model of ``config``; the other values as for `megatron_args`.

    ``described``: the ``GPTModel``, or ``model`` itself, which have the same names for embeddings and positions.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if _is_plain(value)}
    values |= {
        "seq_length": max_position_embeddings,
        "max_position_embeddings": max_position_embeddings,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "untie_embeddings_and_output_weights": not described.share_embeddings_and_output_weights,
        "position_embedding_type": described.position_embedding_type,
        # Megatron-LM's default.  Core models do not read it, but pretrain_gpt.py compares it with its flags.
        "add_position_embedding": True,
        "use_rotary_position_embeddings": described.position_embedding_type == "rope",
        "rotary_base": described.rotary_base,
        "rotary_percent": described.rotary_percent,
        "use_rope_scaling": rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor or ROPE_FACTOR,
        # Ours: Megatron-LM stores an argument of this meaning, but its models do not read it until 0.18.
        "seq_len_interpolation_factor": seq_len_interpolation_factor,
        # Megatron Core reads YaRN's attributes from the configuration, whose class lacks them as fields.
        **{name: getattr(config, name) for name in YARN if hasattr(config, name)},
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "swiglu": config.gated_linear_unit and config.activation_func is F.silu,
        "quick_geglu": config.gated_linear_unit and config.activation_func is quick_gelu,
        "squared_relu": False,
        "activation": activation_name(config),  # ours: Megatron-LM has flags for some pairs of activation and gate
        "norm_epsilon": config.layernorm_epsilon,
        "latent_layernorm_epsilon": getattr(config, "latent_layernorm_epsilon", None),  # ours
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "num_experts": config.num_moe_experts,
        "qk_layernorm_all_heads": getattr(config, ALL_HEADS, False),  # ours
        "num_passthrough_mtp_layers": model.num_passthrough_mtp_layers,  # ours
        # The keys on disk are the keys of Transformer Engine's layer spec for every kind of layers.  Megatron-LM's
        # local spec has another name for the norm before a mixture of experts.
        "transformer_impl": "transformer_engine",
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        "data_parallel_random_init": False,
        "no_save_optim": False,
        "no_save_rng": False,
    }
    return argparse.Namespace(**values)


def _is_plain(value: Any) -> bool:
    """Return whether ``torch.load`` reads ``value`` with ``weights_only``, as Megatron-LM does."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN) and not isinstance(value, enum.Enum)
