# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family SmolLM3: the common decoder, in which some layers have no rotary positions."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary
from megatron_selfdistill.model.hf.sliding_windows import listed_layers, window_keys, write_layer_types, write_window


def _read(config: HFConfig) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False, None), "biases are not known here")
    has_rope = _layers_with_rope(config)
    transformer = window_keys(config, _windows(config, has_rope))
    if not all(has_rope):
        transformer["no_rope_freq"] = [1 - rope for rope in has_rope]
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


def _windows(config: HFConfig, has_rope: list[int]) -> list[bool]:
    """Return the layers with a sliding window, as transformers chooses them."""
    if config["layer_types"] is not None:
        return listed_layers(config)
    return [bool(config["use_sliding_window"] and not rope) for rope in has_rope]


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    without = arch["no_rope_freq"] or [0] * arch["num_layers"]
    return {
        **write_common(arch),
        **write_rotary(arch),
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1 - skips for skips in without],
        **_write_windows(arch),
        "pad_token_id": None,  # transformers' default lies outside of a small vocabulary
    }


def _write_windows(arch: dict[str, Any]) -> dict[str, Any]:
    window = write_window(arch)
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    layer_types = write_layer_types(arch["window_attn_skip_freq"])
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": layer_types}


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
    limits="no biases; sliding windows as `layer_types` says; `no_rope_layers` names one entry per layer",
)
