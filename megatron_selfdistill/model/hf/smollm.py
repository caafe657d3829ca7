# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family SmolLM3: the common decoder, in which some layers have no rotary positions."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, require_full_attention, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary


def _read(config: HFConfig) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False, None), "biases are not known here")
    has_rope = _layers_with_rope(config)
    require_full_attention(config, _slides(config, has_rope))
    transformer = {} if all(has_rope) else {"no_rope_freq": [1 - rope for rope in has_rope]}
    return read_common(config, transformer=transformer, **rotary_fields(read_rope(config), config))


def _layers_with_rope(config: HFConfig) -> list[int]:
    """Return 1 for each layer with rotary positions and 0 for each other layer."""
    num_layers, given = config["num_hidden_layers"], config["no_rope_layers"]
    if given is None:
        interval = config["no_rope_layer_interval"]
        return [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if len(given) != num_layers:
        raise ConfigError(
            f"config.json of {config.architecture} has {len(given)} entries in no_rope_layers, expected one for each "
            f"of the {num_layers} layers"
        )
    return [int(bool(rope)) for rope in given]


def _slides(config: HFConfig, has_rope: list[int]) -> bool:
    """Return whether a layer has a sliding window, as transformers makes its masks."""
    if config["layer_types"] is not None:
        return "sliding_attention" in config["layer_types"]
    return bool(config["use_sliding_window"] and not all(has_rope))


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    without = arch["no_rope_freq"] or [0] * arch["num_layers"]
    return {
        **write_common(arch),
        **write_rotary(arch),
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1 - skips for skips in without],
        "use_sliding_window": False,
        "sliding_window": None,
        "pad_token_id": None,  # transformers' default lies outside of a small vocabulary
    }


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    _read,
    _write,
    COMMON_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    models="SmolLM3-3B",
    limits="no biases, no active sliding window; `no_rope_layers` names one entry per layer",
)
