# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family Seed-OSS: the common decoder, in which config.json decides on the biases of q, k and v."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.model.hf.dense import COMMON_DEFAULTS, read_common, write_common
from megatron_selfdistill.model.hf.family import Family, HFConfig
from megatron_selfdistill.model.hf.rope import read_rope, rotary_fields, write_rotary


def _read(config: HFConfig) -> ModelConfig:
    for name in ("attention_out_bias", "mlp_bias"):
        config.require(name, (False,), "Megatron has biases of q, k and v alone, or of all linear layers")
    config.require("attention_bias", (True, False), "expected true or false")
    return read_common(config, add_qkv_bias=config["attention_bias"], **rotary_fields(read_rope(config), config))


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    return {
        **write_common(arch),
        **write_rotary(arch),
        "attention_bias": arch["add_qkv_bias"],
        "attention_out_bias": False,
        "mlp_bias": False,
    }


SEED_OSS = Family(
    "SeedOssForCausalLM",
    "seed_oss",
    _read,
    _write,
    COMMON_DEFAULTS | {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False},
    models="Seed-OSS-36B",
    limits="`attention_bias` (of q, k and v) may be true or false; no other biases",
)
