# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published models: their sizes, and the blocks of FP8 in which some of them are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiers import combinations

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.interop.hf.rules import dequantise_blocks

PUBLISHED = json.loads(Path(__file__).with_name("published_models.json").read_text(encoding="utf-8"))
"""Name of a model -> its config.json, and how many numbers its tensors have."""
MANY_RULES = ("Kimi-K2-Instruct", "DeepSeek-V3", "Qwen3-Next-80B-A3B-Instruct", "MiniMax-M2", "GLM-4.6")
"""Models with hundreds of experts in each of many layers, each with rules of its own: seconds per model."""


@combinations(name=list(PUBLISHED), quick={"name": [name for name in PUBLISHED if name not in MANY_RULES]}, strength=1)
def test_a_published_model_has_as_many_parameters_as_its_authors_say(name):
    config = PUBLISHED[name]["config"]
    family = family_of(config)
    rules = family.rules(family.model_config(config))
    count = sum(torch.Size(rule.shape).numel() for rule in rules if not rule.is_passthrough)
    assert count == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("shape", [(256, 128), (7, 13), (130, 300), (1, 1)])
@pytest.mark.parametrize("block", [(128, 128), (4, 6)])
def test_dequantised_blocks_are_weight_times_scale(shape, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(*(-(-n // size) for n, size in zip(shape, block, strict=True)), generator=generator) + 0.5
    wide = scale.double()[torch.arange(shape[0]) // block[0]][:, torch.arange(shape[1]) // block[1]]
    got = dequantise_blocks(weight, scale, block)
    assert got.dtype == torch.float32 and got.equal((weight.double() * wide).float())
    with pytest.raises(ConfigError, match="scales of shape"):
        dequantise_blocks(weight, torch.ones(3, 9), block)
