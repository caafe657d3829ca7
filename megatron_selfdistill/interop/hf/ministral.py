# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The families Ministral 3 and Mistral 3.

Ministral 3 is the decoder of Mistral, whose queries grow with their position beyond a length.  Mistral 3 is a text
model of Mistral or Ministral 3 with a vision tower, whose tensors are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.dense import MISTRAL, read_common, write_common
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.interop.hf.rules import renamed
from megatron_selfdistill.interop.hf.sliding_windows import window_keys, write_window
from megatron_selfdistill.model.model_values import differences

_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"


def _read(config: HFConfig) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False, None), "Ministral3ForCausalLM has no biases")
    rope = read_rope(config)
    _refuse_growing_queries(config, rope.parameters)
    return read_common(config, transformer=window_keys(config), **rotary_fields(rope, config))


def _refuse_growing_queries(config: HFConfig, rope: dict[str, Any]) -> None:
    """Raise ConfigError where a position within the longest sequence has a factor of queries other than 1.

    transformers multiplies the query at position p by 1 + beta * log(1 + floor(p / original)).
    """
    beta, original, longest = rope.get(_BETA), rope.get(_ORIGINAL), config["max_position_embeddings"]
    if beta is None or original is None:
        raise config.error(f"has rope_parameters without {_BETA if beta is None else _ORIGINAL}")
    if beta and longest > original:
        raise config.error(
            f"has {_BETA}={beta}, by which queries grow from position {original} on, but not in Megatron: set "
            f"max_position_embeddings to {original} if no sequence is longer"
        )


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    rotary = write_rotary(arch)
    parameters = rotary["rope_scaling"] or {"rope_type": "default"}
    length = {_ORIGINAL: arch["max_position_embeddings"]}
    return {
        **write_common(arch),
        "rope_parameters": {**length, **parameters, "rope_theta": rotary["rope_theta"], _BETA: 0.0},
        "sliding_window": write_window(arch),
        "pad_token_id": None,
    }


MINISTRAL3 = Family(
    "Ministral3ForCausalLM",
    "ministral3",
    _read,
    _write,
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            _ORIGINAL: 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            _BETA: 0.1,
        },
    },
)
_TEXT_FAMILIES = {family.model_type: family for family in (MISTRAL, MINISTRAL3)}


def _text_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model alone.

    The whole model says whether embeddings are tied; without a word of it the text model says so.

    Raises: ConfigError for a text model of another type.
    """
    text = dict(hf_config.get("text_config") or {})
    kind = text.get("model_type", MISTRAL.model_type)
    family = _TEXT_FAMILIES.get(kind)
    if family is None:
        raise ConfigError(
            f"config.json has text_config.model_type={kind!r}: only {' and '.join(_TEXT_FAMILIES)} are known"
        )
    tied = hf_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return text | {"architectures": [family.architecture], "tie_word_embeddings": tied}


def _read_mistral3(config: HFConfig) -> ModelConfig:
    text = _text_config(config.values)
    (architecture,) = text["architectures"]
    family = next(family for family in _TEXT_FAMILIES.values() if family.architecture == architecture)
    model = family.model_config(text)
    if differences(model, family.model_config(text | {"layer_types": None})):
        raise config.error("has layer_types in its text_config, which transformers ignores: remove layer_types")
    return model


def _write_mistral3(arch: dict[str, Any]) -> dict[str, Any]:
    raise ConfigError("Mistral3ForConditionalGeneration has a vision tower, which a model of this program has not")


MISTRAL3 = Family(
    "Mistral3ForConditionalGeneration",
    "mistral3",
    _read_mistral3,
    _write_mistral3,
    adapt=lambda rule: renamed(rule, lambda name: f"language_model.{name}"),
    text_config=_text_config,
    carried=("vision_tower.", "multi_modal_projector."),
)
