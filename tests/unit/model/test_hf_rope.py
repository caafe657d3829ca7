# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rotary positions of a config.json are those that transformers reads from it, or a sentence."""

from __future__ import annotations

import json
from typing import Any

import hf_models
import pytest
import transformers

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.family import HFConfig
from megatron_selfdistill.model.hf.mapping import FAMILIES
from megatron_selfdistill.model.hf.rope import read_rope

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
    with pytest.raises(ConfigError, match=r"rope_scaling=.* and rope_parameters=.*, which differ: .* keep only"):
        read(config)
