# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The types of the fields of a config.json that a conversion reads.

A config.json may come from any source.  Every value passes `checked` before a family computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.errors import ConfigError

_SHOWN_CHARACTERS = 60
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class FieldType:
    """The values that a field of config.json may have."""

    words: str
    """What a message expects, such as ``true or false``."""
    holds: Callable[[Any], bool]
    """A function of a value that says whether the value has this type."""
    or_null: bool = False
    """Whether null is allowed, which is a default or the absence of a part."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(holds(entry) for entry in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


SIZE = FieldType("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
COUNT = FieldType("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
LAYERS = FieldType(
    f"a whole number from 1 to {_MOST_LAYERS}", lambda value: _is_whole(value) and 1 <= value <= _MOST_LAYERS
)
NUMBER = FieldType("a finite number", _is_number)
POSITIVE = FieldType("a finite number above 0", lambda value: _is_number(value) and value > 0)
SHARE = FieldType("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
SPREAD = FieldType("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = FieldType("true or false", lambda value: isinstance(value, bool))
TEXT = FieldType("a text", _is_text)
TEXTS = FieldType("a list of texts", _list_of(_is_text))
SIZES = FieldType("a list of whole numbers of at least 1", _list_of(SIZE.holds))
COUNTS = FieldType("a list of whole numbers of at least 0", _list_of(COUNT.holds))
OBJECT = FieldType("an object", lambda value: isinstance(value, dict))

_REQUIRED = {
    LAYERS: "num_hidden_layers",
    SIZE: "vocab_size hidden_size intermediate_size num_attention_heads max_position_embeddings num_experts_per_tok "
    "moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim n_group topk_group num_experts num_local_experts n_routed_experts "
    "full_attention_interval no_rope_layer_interval "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
    "original_max_position_embeddings",
    COUNT: "max_window_layers first_k_dense_replace n_shared_experts",
    POSITIVE: "rms_norm_eps rope_theta routed_scaling_factor low_freq_factor high_freq_factor",
    SPREAD: "initializer_range",
    FLAG: "tie_word_embeddings norm_topk_prob qkv_bias attention_out_bias truncate",
    TEXT: "hidden_act rope_type type",
}
_OR_NULL = {
    SIZE: "num_key_value_heads head_dim q_lora_rank rotary_dim",
    COUNT: "sliding_window moe_layer_freq shared_intermediate_size num_nextn_predict_layers num_mtp_layers",
    POSITIVE: "factor attention_factor beta_fast beta_slow swiglu_alpha swiglu_limit clip_qkv",
    NUMBER: "mscale mscale_all_dim llama_4_scaling_beta",
    SHARE: "partial_rotary_factor",
    FLAG: "attention_bias mlp_bias use_sliding_window use_qk_norm use_routing_bias rope_interleave attn_output_gate "
    "is_causal",
    TEXT: "model_type scoring_func topk_method qk_norm_type quant_method",
    TEXTS: "architectures layer_types",
    COUNTS: "mlp_only_layers no_rope_layers attn_type_list",
    SIZES: "weight_block_size",
    OBJECT: "rope_scaling rope_parameters quantization_config text_config per_layer_config",
}

FIELDS: dict[str, FieldType] = {
    name: FieldType(kind.words, kind.holds, or_null)
    for table, or_null in ((_REQUIRED, False), (_OR_NULL, True))
    for kind, names in table.items()
    for name in names.split()
}
"""The types of all fields that a family reads, by name, also of the fields within rope_parameters and the like."""


def checked(name: str, value: Any, owner: str = "config.json", within: str = "") -> Any:
    """Return ``value``, the field ``name`` of ``owner``; ``within`` is the object that holds the field.

    Raises: ConfigError for a value of another type.
    """
    kind = FIELDS[name]
    if kind.holds(value) or (value is None and kind.or_null):
        return value
    where = f"{within}.{name}" if within else name
    raise ConfigError(f"{owner} has {where}={shown(value)}: expected {kind.words}{' or null' * kind.or_null}")


def shown(value: Any) -> str:
    """Return the beginning of ``value`` for a message, as Python spells it, except null."""
    try:
        text = "null" if value is None else repr(value)
    except RecursionError:
        return f"a {type(value).__name__} of very many levels"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
