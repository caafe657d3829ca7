# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family Mistral 3: a text model of Mistral or Ministral 3 with a vision tower, whose tensors are carried along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.config_fields import checked
from megatron_selfdistill.model.hf.dense import MISTRAL
from megatron_selfdistill.model.hf.family import Family, HFConfig, differences
from megatron_selfdistill.model.hf.ministral import MINISTRAL3
from megatron_selfdistill.model.hf.rules import Rule, prefixed

_TEXT_FAMILIES = {family.model_type: family for family in (MISTRAL, MINISTRAL3)}


def _text_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model alone.

    The whole model says whether embeddings are tied; without a word of it the text model says so.

    Raises: ConfigError for a text model of another type.
    """
    text = dict(checked("text_config", hf_config.get("text_config")) or {})
    kind = checked("model_type", text.get("model_type", MISTRAL.model_type), within="text_config")
    family = _TEXT_FAMILIES.get(kind)
    if family is None:
        raise ConfigError(
            "config.json of Mistral3ForConditionalGeneration has a text_config with "
            f"model_type={kind!r}: only {' and '.join(_TEXT_FAMILIES)} are known here"
        )
    tied = hf_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return text | {"architectures": [family.architecture], "tie_word_embeddings": tied}


def _read(config: HFConfig) -> ModelConfig:
    text = _text_config(config.values)
    (architecture,) = text["architectures"]
    family = next(family for family in _TEXT_FAMILIES.values() if family.architecture == architecture)
    model = family.model_config(text)
    if differences(model, family.model_config(text | {"layer_types": None})):
        raise ConfigError(
            f"{config.owner} has a text_config with layer_types={text['layer_types']}, which transformers ignores in "
            "this model: remove layer_types"
        )
    return model


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    raise ConfigError("Mistral3ForConditionalGeneration has a vision tower, which a model of this program has not")


def _prefix(rule: Rule) -> Rule:
    return prefixed(rule, "language_model.")


MISTRAL3 = Family(
    "Mistral3ForConditionalGeneration",
    "mistral3",
    _read,
    _write,
    models="Mistral Small 3.1 and 3.2, Ministral 3",
    limits="the text model as `MistralForCausalLM` or `Ministral3ForCausalLM`; the vision tower is carried along "
    "and not trained",
    adapt=_prefix,
    text_config=_text_config,
    carried=("vision_tower.", "multi_modal_projector."),
)
