# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the sliding windows of a config.json.

Hugging Face's ``sliding_window`` counts the token itself, and Megatron's ``window_size=(left, 0)`` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.interop.hf.family import HFConfig
from megatron_selfdistill.model.model_values import architecture

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""The values of ``layer_types``."""


def window_keys(config: HFConfig, sliding: Sequence[bool] = (True,)) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` for the layers with a window.

    ``sliding`` has one value per layer, or one value for all layers.

    A window as long as the longest sequence of the model is no window.

    Raises: ConfigError for a window that is not a positive number.
    """
    window, longest = config["sliding_window"], config["max_position_embeddings"]
    if not any(sliding) or window is None or window >= longest:
        return {}
    if not isinstance(window, int) or window < 1:
        raise config.error(f"has sliding_window={window!r}: expected 1 or more")
    keys: dict[str, Any] = {"window_size": [window - 1, 0]}
    if not all(sliding):
        keys["window_attn_skip_freq"] = [int(windowed) for windowed in sliding]
    return keys


def listed_layers(config: HFConfig) -> list[bool]:
    """Return the layers with a window by ``layer_types``, which `require_layer_types` checks."""
    return [kind == SLIDING for kind in config["layer_types"]]


def require_layer_types(config: HFConfig, model: ModelConfig) -> None:
    """Raise ConfigError if ``layer_types`` names other layers than the model has.

    Many classes of transformers choose the layers with a window without ``layer_types``, and their caches with it.
    """
    given = config["layer_types"]
    if given is None:
        return
    arch = architecture(model)
    linear = arch["linear_attention_freq"] or [0] * model.num_layers
    sliding = arch["window_attn_skip_freq"] or [0] * model.num_layers
    kinds = [
        LINEAR if is_linear else SLIDING if slides else FULL for is_linear, slides in zip(linear, sliding, strict=True)
    ]
    window = config["sliding_window"]
    if window is not None and window >= config["max_position_embeddings"]:  # a window that no sequence reaches
        given = [FULL if kind == SLIDING else kind for kind in given]
    for layer, (got, expected) in enumerate(zip_longest(given, kinds)):
        if got != expected:
            raise config.error(
                f"has {got} as entry {layer} of layer_types, but its other fields make that {expected}: remove the list"
            )


def qwen_layers(config: HFConfig) -> list[bool]:
    """Return the layers with a window of Qwen2 and Qwen3: by ``layer_types``, else from ``max_window_layers`` on.

    Raises: ConfigError where ``layer_types`` names layers with a window and ``use_sliding_window`` is false, for which
    transformers finds no window.
    """
    used = config["use_sliding_window"]
    if config["layer_types"] is None:
        first = config["max_window_layers"] if used else config["num_hidden_layers"]
        return [layer >= first for layer in range(config["num_hidden_layers"])]
    sliding = listed_layers(config)
    if any(sliding) and not used:
        raise config.error(f"has layer_types with {SLIDING} but use_sliding_window=false: change one of them")
    return sliding


def write_window(arch: dict[str, Any]) -> int | None:
    """Return ``sliding_window`` for ``arch``; None for full attention in every layer."""
    return None if arch["window_size"] is None else int(arch["window_size"][0]) + 1


def write_qwen_windows(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Qwen2 and Qwen3 for ``arch``: the inverse of `qwen_layers`; none for full attention."""
    window = write_window(arch)
    if window is None:
        return {}
    sliding = arch["window_attn_skip_freq"]
    fields = {"use_sliding_window": True, "sliding_window": window, "layer_types": write_layer_types(sliding)}
    if sliding == sorted(sliding):  # older programs know no other pattern
        fields["max_window_layers"] = sliding.index(1)
    return fields


def write_layer_types(sliding: Sequence[int]) -> list[str]:
    """Return ``layer_types`` for a list with 1 for each layer that has a window."""
    return [SLIDING if windowed else FULL for windowed in sliding]
