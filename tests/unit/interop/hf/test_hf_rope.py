# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rotary positions of a config.json are those that transformers reads and computes from it, or a sentence."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hf_models
import models
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config

from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.family import HFConfig
from megatron_selfdistill.interop.hf.mapping import FAMILIES
from megatron_selfdistill.interop.hf.rope import read_rope
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.model_values import differences

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 1000000.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 500000.0},
    "nothing": {},
    "rope_scaling": {"rope_theta": 500000.0, "rope_scaling": YARN},
    "rope_scaling, older type": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "rope_parameters": {"rope_parameters": {**YARN, "rope_theta": 500000.0}},
    "rope_parameters and theta": {"rope_theta": 500000.0, "rope_parameters": YARN},
    "rope_scaling null": {"rope_scaling": None, "rope_parameters": DEFAULT},
    "both, equal": {"rope_theta": 500000.0, "rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 500000.0}},
}


def config_json(tmp_path: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Write a config.json of a Qwen3 with these fields about its rotary positions; returns it."""
    config = hf_models.hf_config("qwen3").to_dict()
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    config |= {"architectures": ["Qwen3ForCausalLM"], **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return config


def read(config: dict[str, Any]) -> Any:
    return read_rope(HFConfig("Qwen3ForCausalLM", config, FAMILIES["Qwen3ForCausalLM"].defaults))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rope_is_what_transformers_reads(tmp_path, spelling):
    rope = read(config_json(tmp_path, SPELLINGS[spelling]))
    oracle = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (rope.kind, rope.base) == (oracle["rope_type"], oracle["rope_theta"])
    for name in ("factor", "original_max_position_embeddings"):
        assert rope.parameters.get(name) == oracle.get(name)


def test_yarn_added_to_a_directory_that_names_another_rope_is_refused_and_never_dropped(tmp_path):
    config = config_json(tmp_path, {"rope_parameters": DEFAULT, "rope_scaling": YARN})
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "yarn"
    with pytest.raises(ConfigError, match=r"rope_scaling=.* and rope_parameters=.*, which differ: keep only"):
        read(config)


LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""As the model cards of Qwen2.5 and Qwen3 ask for more than 32768 tokens."""
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "model card": LONG,
    "older spelling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "betas": {**LONG, "beta_fast": 16, "beta_slow": 2.5},
    "attention factor": {**LONG, "attention_factor": 1.3},
    "attention factor 1": {**LONG, "attention_factor": 1.0},
    "both mscales": {**LONG, "mscale": 0.7, "mscale_all_dim": 0.4},
    "mscale alone": {**LONG, "mscale": 0.7},
    "mscale_all_dim alone": {**LONG, "mscale_all_dim": 0.7},
    "not rounded": {**LONG, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "factor from the lengths": {**LONG, "factor": None, "original_max_position_embeddings": 16},
    "length from the model": {"rope_type": "yarn", "factor": 4.0},
    "factor 1": {**LONG, "factor": 1.0},
}


def rotations(configured: list[ModelConfig]) -> list[tuple[torch.Tensor, float]]:
    """Return the inverse frequencies of each model, and the factor by which it multiplies cos and sin."""
    found = []
    for model in configured:
        chunks, _ = models.build(dataclasses.replace(model, num_layers=1), ParallelConfig())
        gpt = unwrapped(chunks[0])
        table = gpt.rotary_pos_emb(2)
        angles = table[0] if isinstance(table, tuple) else table
        inv_freq = angles[1, 0, 0, : angles.size(-1) // 2]
        found.append((inv_freq, _yarn_get_concentration_factor_from_config(gpt.config)))
    return found


def test_scaled_positions_are_those_that_transformers_computes_and_are_written_back(tmp_path, ranks):
    family, expected, configured = FAMILIES["Qwen3ForCausalLM"], [], []
    for scaling in SCALED.values():
        config = config_json(tmp_path, {"rope_theta": 500000.0, "rope_scaling": scaling})
        oracle = transformers.AutoConfig.from_pretrained(tmp_path)
        expected.append(ROPE_INIT_FUNCTIONS[oracle.rope_parameters["rope_type"]](oracle, "cpu"))
        configured.append(family.model_config(config))
        written = json.loads(json.dumps(family.hf_config(configured[-1])))
        assert differences(family.model_config(written), configured[-1]) == {}
    (found,) = ranks.run(rotations, configured, world_size=1)
    for name, (inv_freq, factor), mine in zip(SCALED, expected, found, strict=True):
        torch.testing.assert_close(mine[0], inv_freq, rtol=1e-6, atol=0, msg=name)
        assert mine[1] == pytest.approx(factor, rel=1e-9), name
    assert len({(round(float(f.sum()), 5), round(a, 5)) for f, a in expected}) > len(SCALED) - 5, "the cases differ"
