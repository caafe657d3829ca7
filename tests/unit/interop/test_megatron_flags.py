# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The flags of Megatron-LM for every family, as stored here; test_megatron_lm.py gives them to its own parser."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.interop.describe import describe
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.interop.megatron_flags import MEGATRON_LM, megatron_flags
from megatron_selfdistill.model.model_values import differences

INEXPRESSIBLE = ("llama_linear", "deepseek_v3", "moonlight", "olmoe", "minimax_m2")
if not older_megatron.has_flags_of_positions():
    INEXPRESSIBLE += ("qwen3_yarn", "gpt_oss", "ministral3")
DEFAULTS = {
    **dict.fromkeys(["add_bias_linear", "bias_gelu_fusion", "yarn_correction_range_round_to_int"], True),
    **dict.fromkeys(
        "swiglu quick_geglu qk_layernorm add_qkv_bias group_query_attention use_rope_scaling".split(), False
    ),
    **dict.fromkeys("untie_embeddings_and_output_weights multi_latent_attention".split(), False),
    **{"num_query_groups": 1, "q_lora_rank": None},
}
"""Megatron-LM's own values of arguments without a flag in the line."""
NEGATIONS = {"disable_bias_linear": "add_bias_linear"} | {f"no_{name}": name for name in DEFAULTS}
NO_FLAGS = ("vocab_size", "num_passthrough_mtp_layers")
"""The values that the padded vocabulary and the checkpoint state."""
RENAMED = {"apply_layernorm_1p": "layernorm_zero_centered_gamma"}


FLAGS, IMPOSSIBLE = f"flags of Megatron-LM {MEGATRON_LM}", f"not possible in Megatron-LM {MEGATRON_LM}"


def pairs(words: list[str]) -> set[tuple[str, ...]]:
    """Split an argument vector into flags with their values."""
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    return {tuple(words[a:b]) for a, b in zip(starts, [*starts[1:], len(words)], strict=True)}


def line_of(path: Path) -> str:
    return describe(path)[FLAGS]


def model_of(directory: Path) -> ModelConfig:
    config = json.loads((directory / "config.json").read_text())
    return family_of(config).model_config(config)


GATED_DELTA = [kind for kind, (_, sizes) in hf_models.CONFIGS.items() if "linear_num_key_heads" in sizes]


def parsed(words: list[str]) -> argparse.Namespace:
    """Return the arguments that Megatron-LM has after it has parsed the flags."""
    values: dict[str, Any] = dict(DEFAULTS)
    for flag, *given in pairs(words):
        name = flag.removeprefix("--").replace("-", "_")
        if name in NEGATIONS:
            values[NEGATIONS[name]] = False
        else:
            values[RENAMED.get(name, name)] = value_of(given[0]) if given else True
    return argparse.Namespace(**values)


def value_of(text: str) -> Any:
    if re.fullmatch(r"\d+,\d+", text):
        return [int(number) for number in text.split(",")]
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("kind", [kind for kind in hf_models.CONFIGS if kind not in GATED_DELTA])
def test_the_flags_of_a_family_describe_its_model_or_say_that_they_do_not(hf_directory, kind):
    model = model_of(hf_directory(kind))
    flags = megatron_flags(model)
    assert bool(flags.not_expressible) == (kind in INEXPRESSIBLE)
    found = architecture_from_args(parsed(flags.arguments))
    differing = {name for name in differences(found, model) if name not in NO_FLAGS}
    unsaid = {reason.partition("=")[0] for reason in flags.not_expressible}
    if "position_embedding_type" in unsaid:  # without YaRN its values have no effect
        differing = {name for name in differing if not name.startswith("yarn_")}
    assert differing <= unsaid
    assert pairs(flags.arguments) >= {("--hidden-dropout", "0.0"), ("--attention-dropout", "0.0")}
    if model.num_moe_experts is not None:
        assert ("--moe-router-load-balancing-type", "none") in pairs(flags.arguments)
    if model.transformer.get("moe_router_enable_expert_bias"):
        assert ("--moe-router-bias-update-rate", "0.0") in pairs(flags.arguments)


IMPOSSIBLE_MODELS = {
    "llama3 factor": ({"rope_scaling_factor": 32.0}, "rope_scaling_factor=32.0"),
    "gated gelu": ({"activation": "gelu"}, "activation=gelu"),
    "tanh gelu without biases": (
        {"activation": "gelu_tanh", "gated_linear_unit": False},
        "activation=gelu_tanh",
    ),
    "divided positions": ({"seq_len_interpolation_factor": 2.5}, "seq_len_interpolation_factor=2.5"),
    "softmax scale": ({"transformer": {"softmax_scale": 0.3}}, "softmax_scale=0.3"),
}
if not older_megatron.has_flags_of_positions():
    IMPOSSIBLE_MODELS |= {
        "divided positions": ({"seq_len_interpolation_factor": 4.0}, "seq_len_interpolation_factor=4.0"),
        "YaRN": ({"position_embedding_type": "yarn"}, "position_embedding_type=yarn"),
    }


@pytest.mark.parametrize("case", IMPOSSIBLE_MODELS)
def test_what_megatron_lm_cannot_be_given_is_one_message(case):
    changes, message = IMPOSSIBLE_MODELS[case]
    (reason,) = megatron_flags(ModelConfig(vocab_size=64, **changes)).not_expressible
    assert reason == message
    assert not megatron_flags(ModelConfig(vocab_size=64, rope_scaling_factor=8.0)).not_expressible


def test_rarer_properties_have_their_flags():
    transformer = {"layernorm_zero_centered_gamma": True, "window_size": [7, 0], "moe_apply_probs_on_input": True}
    found = pairs(megatron_flags(ModelConfig(num_moe_experts=4, transformer=transformer)).arguments)
    assert found >= {("--apply-layernorm-1p",), ("--window-size", "7,0"), ("--moe-apply-probs-on-input",)}
    assert not any(name == "--window-attn-skip-freq" for name, *_ in found)
    divided = pairs(megatron_flags(ModelConfig(seq_len_interpolation_factor=4.0)).arguments)
    assert (("--rotary-seq-len-interpolation-factor", "4") in divided) is older_megatron.has_flags_of_positions()
    alternating = {"window_size": [7, 0], "window_attn_skip_freq": 2}
    found = pairs(megatron_flags(ModelConfig(num_layers=4, transformer=alternating)).arguments)
    assert found >= {("--window-size", "7,0"), ("--window-attn-skip-freq", "[1,0,1,0]")}


def test_inspect_gives_the_whole_line_to_paste(hf_directory, tmp_path):
    hf_to_megatron(hf_directory("qwen3"), tmp_path / "megatron", dtype=torch.bfloat16)
    usage = describe(tmp_path / "megatron")
    assert IMPOSSIBLE not in usage
    found = pairs(shlex.split(usage[FLAGS]))
    assert found == pairs(megatron_flags(model_of(hf_directory("qwen3"))).arguments) | {
        ("--load", str(tmp_path / "megatron")),
        ("--ckpt-format", "torch_dist"),
        ("--bf16",),
    }


def test_the_line_names_the_tokenizer_that_the_checkpoint_carries_and_another_iteration_than_the_trackers(
    hf_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr("megatron_selfdistill.interop.describe.num_tokens", lambda assets: None)  # the files are empty
    release = hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    carried = release / "huggingface"
    (carried / "tokenizer.model").write_bytes(b"")
    shutil.copytree(release, tmp_path / "megatron" / "iter_0000003")
    line = shlex.split(line_of(release))
    assert ("--tokenizer-type", "SentencePieceTokenizer") in pairs(line) and "--ckpt-step" not in line
    (carried / "tokenizer_config.json").write_text("{}")
    line = shlex.split(line_of(release))
    assert pairs(line) >= {("--tokenizer-type", "HuggingFaceTokenizer"), ("--tokenizer-model", str(carried))}
    assert "--ckpt-step" in shlex.split(line_of(tmp_path / "megatron" / "iter_0000003"))


def test_what_no_flag_expresses_is_part_of_inspect(hf_directory, tmp_path):
    hf_to_megatron(hf_directory("deepseek_v3"), tmp_path / "megatron")
    assert "beta_fast=8" in describe(tmp_path / "megatron")[IMPOSSIBLE]


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_a_conversion_stores_the_layer_spec_whose_names_it_has(hf_directory, tmp_path, kind):
    args = stored_args(hf_to_megatron(hf_directory(kind), tmp_path / "megatron"))
    assert isinstance(args, argparse.Namespace)
    assert args.transformer_impl == "transformer_engine" and args.add_position_embedding is True
