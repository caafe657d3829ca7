# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A config.json with unusual or contradictory fields is refused, or has the logits that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import transformers
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.errors import ConfigError

KINDS = list(hf_models.CONFIGS)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
BETA = {"llama_4_scaling_beta": 0.0}
LENGTH = {"original_max_position_embeddings": 32}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, FULL, SLIDING]
USED = {"use_sliding_window": True, "sliding_window": 6}


SCALED: dict[str, dict[str, Any]] = {
    "betas": {"beta_fast": 16, "beta_slow": 2.5},
    "an attention factor": {"attention_factor": 1.3},
    "the attention factor 1": {"attention_factor": 1.0},
    "both mscales": {"mscale": 0.7, "mscale_all_dim": 0.4},
    "mscale alone": {"mscale": 0.7},
    "mscale_all_dim alone": {"mscale_all_dim": 0.7},
    "a range that is not rounded": {"truncate": False},
    "a factor from the lengths": {"factor": None},
    "the factor 1": {"factor": 1.0},
}
"""Further entries of YaRN's."""
ALONE = {"rope_parameters": None, "rope_theta": 100.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as saved": {},
    "yarn beside rope_parameters": {"rope_scaling": YARN},
    "yarn with the base beside rope_parameters": {"rope_scaling": {**YARN, "rope_theta": 5000.0}},
    "linear beside rope_parameters": {"rope_scaling": LINEAR},
    "default beside rope_parameters": {"rope_scaling": {"rope_type": "default"}},
    "yarn alone": {"rope_parameters": None, "rope_scaling": {**YARN, **BETA}},
    "linear alone": {"rope_parameters": None, "rope_scaling": LINEAR},
    "linear in parameters": {"rope_parameters": {**LINEAR, "rope_theta": 500.0}},
    **{f"yarn with {name}": {**ALONE, "rope_scaling": YARN | changes} for name, changes in SCALED.items()},
    "no positions": {"rope_parameters": None},
    "base alone": {"rope_parameters": None, "rope_theta": 77.0},
    "half of the channels": {"rope_parameters": HALF},
    "half beside": {"partial_rotary_factor": 0.5},
    "length beside": LENGTH,
    "length beside yarn": {**LENGTH, "rope_parameters": {**YARN, "rope_theta": 100.0}},
    "length beside yarn alone": {**LENGTH, "rope_parameters": None, "rope_scaling": {**YARN, **BETA}},
    "window": {"sliding_window": 6},
    "window used": USED,
    "window used, types null": {**USED, "layer_types": None, "max_window_layers": 2},
    "types full, window": {"layer_types": [FULL] * 4, "sliding_window": 6},
    "types full, window used": {"layer_types": [FULL] * 4, **USED},
    "types sliding": {"layer_types": [SLIDING] * 4},
    "types sliding, window": {"layer_types": [SLIDING] * 4, "sliding_window": 6},
    "types mixed, window used": {"layer_types": MIXED, **USED},
    "types null": {"layer_types": None},
    "not causal": {"is_causal": False},
    "epsilon": {"rms_norm_eps": 0.05},
    "normalised experts": {"norm_topk_prob": True},
    "experts not normalised": {"norm_topk_prob": False},
    "two experts": {"num_experts_per_tok": 2},
    "scaled experts": {"routed_scaling_factor": 3.0},
}


def computed_by_transformers(directory: Path, weights: dict[str, Tensor]) -> Tensor | None:
    """Return the logits of the class that transformers chooses by config.json; None if one of both cannot read it."""
    try:
        hf_models.read(directory)
    except ConfigError:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(weights)
        return hf_models.hf_logits(model, hf_models.SEQUENCES)
    except (ValueError, AttributeError, TypeError, KeyError):
        return None


def converted(directories: list[Path]) -> list[Tensor]:
    """Return the logits of this project's model of each directory."""
    found = []
    for directory in directories:
        _, model, rules, tensors = hf_models.read(directory)
        chunks, grid = models.build(model, ParallelConfig())
        hf_models.fill(chunks, rules, tensors)
        found.append(hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES))
    return found


@pytest.mark.full
@combinations(kind=KINDS)
def test_what_is_not_refused_has_the_logits_of_transformers(ranks, written, tmp_path, kind):
    saved, original, _ = written(kind)
    expected: dict[str, Tensor] = {}
    for name, changes in VARIANTS.items():
        config = hf_models.config_of(saved) | changes
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").symlink_to(saved / "model.safetensors")
        if (logits := computed_by_transformers(tmp_path / name, original.state_dict())) is not None:
            expected[name] = logits
    (found,) = ranks.run(converted, [tmp_path / name for name in expected], world_size=1)
    for (name, logits), mine in zip(expected.items(), found, strict=True):
        assert (mine - logits).abs().max() <= hf_models.logits_bound(kind), name
    read = {"as saved", "epsilon"} | ({f"yarn with {name}" for name in SCALED} if kind == "qwen3_yarn" else set())
    assert read <= expected.keys(), "nothing may be refused instead"
    assert len({round(float(logits.abs().sum()), 2) for logits in expected.values()}) > 3, "the variants differ"
