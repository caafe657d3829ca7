# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Map Hugging Face models to Megatron models and back, with one table of full tensors per family.

    family = family_of(config)                    # config.json as a dict
    model = family.model_config(config)           # ModelConfig
    rules = check_names(family.rules(model), names_in_the_directory)
    rule.to_megatron(*hf_tensors), rule.to_hf(tensor)

The functions read no files, know no ranks and compute nothing: Megatron shards tensors, and the converter streams them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError, first_few
from megatron_selfdistill.interop.hf import dense, experts, gpt_oss, minimax, ministral, qwen_next, sigmoid_router
from megatron_selfdistill.interop.hf.family import Family, describe_differences
from megatron_selfdistill.interop.hf.rules import Rule, passthrough_layer
from megatron_selfdistill.model.model_values import differences

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        dense.LLAMA,
        dense.MISTRAL,
        dense.QWEN2,
        dense.QWEN3,
        experts.MIXTRAL,
        experts.QWEN3_MOE,
        sigmoid_router.DEEPSEEK_V3,
        dense.SEED_OSS,
        dense.SMOLLM3,
        dense.PHI3,
        sigmoid_router.GLM4_MOE,
        experts.QWEN2_MOE,
        experts.OLMOE,
        qwen_next.QWEN3_NEXT,
        qwen_next.QWEN3_5,
        qwen_next.QWEN3_5_MOE,
        minimax.MINIMAX_M2,
        gpt_oss.GPT_OSS,
        ministral.MINISTRAL3,
        ministral.MISTRAL3,
    )
}
"""The families by the name in ``architectures`` of a config.json."""

TIED = ("lm_head.weight", "model.embed_tokens.weight")
"""The two names of tied weights.  A directory may lack the first weight, which must equal the second one."""

_SCALES = "_scale_inv"
_COUNTED = (
    *"num_hidden_layers num_experts num_local_experts n_routed_experts".split(),
    *"num_nextn_predict_layers num_mtp_layers".split(),
)
"""The fields of config.json that count layers and experts, each of which has tensors of its own."""


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json by its ``architectures``, else by its ``model_type``.

    Raises: ConfigError for an unknown architecture, and for a ``model_type`` of another model.
    """
    named = list(hf_config.get("architectures") or [])
    model_type = hf_config.get("model_type")
    for name in named:
        if name in FAMILIES:
            _require_type(hf_config, FAMILIES[name], model_type)
            return FAMILIES[name]
    if not named:
        for family in FAMILIES.values():
            if family.model_type == model_type:
                return family
    got = ", ".join(named) or f"model_type {model_type!r}"
    raise ConfigError(f"config.json has {got}, which is not known here: docs/conversion.md lists what converts")


def _require_type(hf_config: Mapping[str, Any], family: Family, model_type: str | None) -> None:
    """Raise ConfigError if transformers, which goes by ``model_type``, takes another class than that of ``family``.

    A model with code of its own (``auto_map``) may have a type of its own.
    """
    if model_type in (None, family.model_type, *family.published_types):
        return
    others = [other.architecture for other in FAMILIES.values() if other.model_type == model_type]
    if hf_config.get("auto_map") and not others:
        return
    instead = f", or {others[0]} in architectures" if others else ""
    raise ConfigError(
        f"config.json has {family.architecture} in architectures and model_type={model_type!r}, by which transformers "
        f"chooses another model: expected model_type={family.model_type!r}{instead}"
    )


def text_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json of the text model, which is ``hf_config`` itself for a model without further parts."""
    family = family_of(hf_config)
    return hf_config if family.text_config is None else family.text_config(hf_config)


def family_of_model(model: ModelConfig) -> Family:
    """Return the first family whose config.json can describe ``model`` completely.

    Raises: ConfigError with the nearest family and the properties that it cannot describe.
    """
    unlike: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        try:
            differing = differences(family.model_config(family.describe(model)), model)
        except ConfigError:
            continue
        if not differing:
            return family
        unlike.append((len(differing), f"{family.architecture}, {describe_differences(differing)}"))
    nearest = f" (nearest: {min(unlike)[1]})" if unlike else ""
    raise ConfigError(f"no known Hugging Face architecture is this model{nearest}")


def check_names(rules: Iterable[Rule], hf_names: Iterable[str]) -> list[Rule]:
    """Return the rules for a directory with the tensors ``hf_names``, without absent passthrough layers.

    transformers saves ``num_nextn_predict_layers`` in config.json, but not those layers.  GLM-4.6 omits the tensors of
    such a layer that copy the model's own (`Rule.may_be_absent`).
    The directory may also have the scales of FP8 weights (``..._scale_inv``), inverse frequencies and `TIED`.

    Raises: ConfigError with the first missing and the first unexpected tensors.
    """
    rules, found = list(rules), set(hf_names)
    held = (rule.hf_names[0] for rule in rules if rule.is_passthrough and found.intersection(rule.hf_names))
    present = set(map(passthrough_layer, held))

    def stays(rule: Rule) -> bool:
        if rule.may_be_absent:
            return bool(found.intersection(rule.hf_names))
        return not rule.is_passthrough or passthrough_layer(rule.hf_names[0]) in present

    rules = [rule for rule in rules if stays(rule)]
    mapped = {name for rule in rules for name in rule.hf_names}
    expected = mapped | {name + _SCALES for name in mapped}
    expected |= {tied_output_layer(name) for name in mapped if name.endswith(TIED[1])}
    missing = sorted(mapped - found)
    extra = sorted(name for name in found - expected if not name.endswith("rotary_emb.inv_freq"))
    _raise_first([f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in extra])
    return rules


def tied_output_layer(embedding: str) -> str:
    """Return the name of the output layer that shares its weights with the embedding of this name (`TIED`)."""
    return embedding.removesuffix(TIED[1]) + TIED[0]


def check_counts(family: Family, hf_config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ConfigError for a config.json with more layers or experts than tensors, before they are enumerated."""
    if family.text_config is not None:
        hf_config = family.text_config(hf_config)
    counted = _COUNTED[:1] if family.tensor_names.fused else _COUNTED
    for name in counted:
        count = hf_config.get(name)
        if isinstance(count, int) and count > len(names):
            raise ConfigError(
                f"config.json has {name}={count}, but only {len(names)} tensors: expected at least one for each"
            )


def check_shapes(rules: Iterable[Rule], hf_shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise ConfigError with the first differences unless every tensor has the shape of its rule."""
    faults = []
    for rule in rules:
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            if tuple(hf_shapes[name]) != shape:
                faults.append(f"{name} has shape {list(hf_shapes[name])}, expected {list(shape)}")
    _raise_first(faults)


def _raise_first(faults: list[str]) -> None:
    if faults:
        raise ConfigError(f"the tensors do not fit this model: {first_few(faults)}")
