# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family Phi-3 (and Phi-4): the common decoder, with q, k and v in one tensor, and gate and up in another."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import llama3_fields, read_rope, write_llama3
from megatron_selfdistill.model.hf.rules import Rule, fused
from megatron_selfdistill.model.hf.sliding_windows import every_layer, window_keys, write_window


def _read(config: HFConfig) -> ModelConfig:
    rope = read_rope(config)
    if rope.kind != "default":
        raise ConfigError(
            f"config.json of {config.architecture} has rope_type={rope.kind!r}: only default is known here, since the "
            "factors of longrope depend on the length of the sequence"
        )
    return read_common(config, transformer=window_keys(config, every_layer(config)), **llama3_fields(rope, config))


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    if arch["rope_scaling"]:
        raise ConfigError("Phi3ForCausalLM has no llama3 rope")
    # transformers' default pad_token_id lies outside of a small vocabulary.
    return write_common(arch) | write_llama3(arch) | {"sliding_window": write_window(arch), "pad_token_id": None}


def _fuse(rule: Rule) -> Rule:
    first = rule.hf_names[0]
    for projection, name in (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj")):
        if f".{projection}." in first:
            return fused(rule, first.replace(projection, name))
    return rule


PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    _read,
    _write,
    COMMON_DEFAULTS | {"rms_norm_eps": 1e-5},
    adapt=_fuse,
    models="Phi-3-mini-4k, Phi-4, Phi-4-reasoning",
    limits="default RoPE on all channels (no longrope, as in the mini models); a sliding window in every layer, or "
    "none",
)
