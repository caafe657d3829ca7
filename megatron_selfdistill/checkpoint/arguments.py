# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ``args`` of a checkpoint, as Megatron-LM's ``--use-checkpoint-args`` reads them."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from typing import Any

import torch
import torch.nn.functional as F

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.model.architecture import uses_transformer_engine
from megatron_selfdistill.model.build import unwrapped

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def megatron_args(chunk: torch.nn.Module, model: ModelConfig) -> argparse.Namespace:
    """Megatron-LM's names for what the model is.

    The live model answers wherever it can, so that a model of ``model.provider`` is described too; ``model`` adds what
    a ``GPTModel`` forgets (the factor of the RoPE scaling, the divisor of the vocabulary).  Holds the plain fields of
    its ``TransformerConfig``, then the fields that Megatron-LM spells differently.
    Source: ``load_args_from_checkpoint`` in Megatron-LM's ``megatron/training/checkpointing.py``, core_v0.16.
    """
    gpt = unwrapped(chunk)
    config = gpt.config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if _is_plain(value)}
    values |= {
        "seq_length": gpt.max_sequence_length,
        "max_position_embeddings": gpt.max_sequence_length,
        "padded_vocab_size": gpt.vocab_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "untie_embeddings_and_output_weights": not gpt.share_embeddings_and_output_weights,
        "position_embedding_type": gpt.position_embedding_type,
        "add_position_embedding": gpt.position_embedding_type == "learned_absolute",
        "use_rotary_position_embeddings": gpt.position_embedding_type == "rope",
        "rotary_base": gpt.rotary_base,
        "rotary_percent": gpt.rotary_percent,
        "use_rope_scaling": gpt.rotary_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "swiglu": config.gated_linear_unit and config.activation_func is F.silu,
        "norm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "num_experts": config.num_moe_experts,
        "transformer_impl": "transformer_engine" if uses_transformer_engine() else "local",
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        "data_parallel_random_init": False,
        "no_save_optim": False,
        "no_save_rng": False,
    }
    return argparse.Namespace(**values)


def _is_plain(value: Any) -> bool:
    """Whether ``torch.load`` reads it with ``weights_only``, as Megatron-LM does: no functions, no enumerations."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN) and not isinstance(value, enum.Enum)
