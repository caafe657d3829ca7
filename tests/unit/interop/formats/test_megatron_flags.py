# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The flags of Megatron-LM for every family, as stored here; test_megatron_lm.py gives them to its own parser."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import hf_models
import pytest
import torch

from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.interop.describe import describe, megatron_lm_usage
from megatron_selfdistill.interop.formats.megatron_flags import MEGATRON_LM, megatron_flags
from megatron_selfdistill.interop.formats.stored_model import stored_args
from megatron_selfdistill.interop.hf.mapping import family_of

COMMON = (
    "--num-layers 4 --hidden-size 36 --ffn-hidden-size 44 --normalization RMSNorm --hidden-dropout 0.0 "
    "--attention-dropout 0.0 --make-vocab-size-divisible-by 128 --padded-vocab-size 128 --num-attention-heads "
    "4 --position-embedding-type rope --rotary-percent 1.0 --disable-bias-linear --swiglu "
)

EXPECTED = {
    "llama2": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --rotary-base 10000 "
    ),
    "llama3": (
        "--max-position-embeddings 65536 --norm-epsilon 1e-06 --kv-channels 10 --group-query-attention "
        "--num-query-groups 2 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8.0 "
    ),
    "mistral": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 10000 "
    ),
    "mistral_window": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 10000 --window-size 6,0 "
    ),
    "qwen2": (
        "--max-position-embeddings 64 --norm-epsilon 1e-06 --kv-channels 10 --group-query-attention "
        "--num-query-groups 2 --add-qkv-bias --rotary-base 1000000 "
    ),
    "qwen3": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 1000000 "
    ),
    "llama_linear": (
        "--max-position-embeddings 64 --norm-epsilon 1e-06 --kv-channels 10 --group-query-attention "
        "--num-query-groups 2 --rotary-base 10000 "
    ),
    "qwen3_yarn": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 100 "
        "--position-embedding-type yarn "
    ),
    "qwen3_window": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 10000 "
        "--window-size 8,0 --window-attn-skip-freq [1,0,0,1] "
    ),
    "mixtral": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 1000000 --num-experts 4 "
        "--moe-ffn-hidden-size 44 --moe-router-topk 2 --moe-router-score-function softmax "
        "--moe-router-load-balancing-type none "
    ),
    "qwen3_moe": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 10000 "
        "--num-experts 4 --moe-ffn-hidden-size 28 --moe-router-topk 3 --moe-router-score-function softmax "
        "--moe-router-load-balancing-type none "
    ),
    "qwen3_moe_mixed": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 10000 "
        "--num-experts 4 --moe-ffn-hidden-size 28 --moe-layer-freq [1,0,1,1] --moe-router-topk 2 "
        "--moe-router-score-function softmax --moe-router-load-balancing-type none --moe-router-pre-softmax "
    ),
    "gpt_oss": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 100 "
        "--position-embedding-type yarn --ffn-hidden-size 32 --quick-geglu --no-bias-gelu-fusion --num-experts 4 "
        "--moe-ffn-hidden-size 32 --moe-router-topk 3 --moe-router-score-function softmax "
        "--moe-router-load-balancing-type none --window-size 5,0 --window-attn-skip-freq [1,0,1,0] "
        "--softmax-type learnable --activation-func-clamp-value 1.25 --glu-linear-offset 1.0 "
    ),
    "deepseek_v3": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--qk-layernorm --rotary-base 10000 --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 20 "
        "--qk-head-dim 12 --qk-pos-emb-head-dim 8 --v-head-dim 14 --rope-type yarn --rotary-scaling-factor "
        "4.0 --mscale 0.8 --mscale-all-dim 0.6 --num-experts 8 --moe-ffn-hidden-size 28 --moe-layer-freq "
        "[0,1,1,1] --moe-router-topk 4 --moe-router-score-function sigmoid --moe-router-load-balancing-type "
        "none --moe-router-topk-scaling-factor 1.7 --moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.0 --moe-router-dtype fp32 "
        "--moe-shared-expert-intermediate-size 56 "
    ),
    "deepseek_v3_plain": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--qk-layernorm --rotary-base 10000 --multi-latent-attention --kv-lora-rank 20 --qk-head-dim 12 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 14 --rope-type rope --num-experts 8 --moe-ffn-hidden-size 28 "
        "--moe-router-topk 4 --moe-router-score-function sigmoid --moe-router-load-balancing-type none "
        "--moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias --moe-router-bias-update-rate "
        "0.0 --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 28 "
    ),
    "seed_oss": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --add-qkv-bias --rotary-base 10000 "
    ),
    "smollm3": (
        "--max-position-embeddings 64 --norm-epsilon 1e-06 --kv-channels 10 --group-query-attention "
        "--num-query-groups 2 --rotary-base 2000000 --no-rope-freq [0,1,0,0] "
        "--window-size 8,0 --window-attn-skip-freq [0,1,0,0] "
    ),
    "qwen2_moe": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --add-qkv-bias --rotary-base 10000 "
        "--num-experts 4 --moe-ffn-hidden-size 28 --moe-router-topk 2 --moe-router-score-function softmax "
        "--moe-router-load-balancing-type none --moe-router-pre-softmax "
        "--moe-shared-expert-intermediate-size 26 --moe-shared-expert-gate "
    ),
    "ministral3": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 10000 "
        "--position-embedding-type yarn "
    ),
    "minimax_m2": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-06 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 5000000 --rotary-percent 0.6 "
        "--num-experts 4 --moe-ffn-hidden-size 44 --moe-router-topk 3 --moe-router-score-function sigmoid "
        "--moe-router-load-balancing-type none --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 0.0 --moe-router-dtype fp32 "
    ),
    "olmoe": (
        "--hidden-size 40 --max-position-embeddings 64 --untie-embeddings-and-output-weights "
        "--norm-epsilon 1e-05 --kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 10000 "
        "--num-experts 4 --moe-ffn-hidden-size 44 --moe-router-topk 3 --moe-router-score-function softmax "
        "--moe-router-load-balancing-type none --moe-router-pre-softmax "
    ),
    "phi3": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 10 --group-query-attention --num-query-groups 2 --rotary-base 10000 "
        "--window-size 6,0 "
    ),
    "moonlight": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 0.01 "
        "--qk-layernorm --rotary-base 10000 --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 20 "
        "--qk-head-dim 12 --qk-pos-emb-head-dim 8 --v-head-dim 14 --rope-type rope --num-experts 8 "
        "--moe-ffn-hidden-size 28 --moe-layer-freq [0,1,1,1] --moe-router-topk 4 --moe-router-score-function sigmoid "
        "--moe-router-load-balancing-type none --moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 0.0 --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 28 "
    ),
    "glm4_moe": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 12 --group-query-attention --num-query-groups 2 --add-qkv-bias --rotary-base 1000000 "
        "--rotary-percent 0.5 --num-experts 8 --moe-ffn-hidden-size 20 --moe-layer-freq [0,1,1,1] "
        "--moe-router-topk 4 --moe-router-score-function sigmoid --moe-router-load-balancing-type none "
        "--moe-router-topk-scaling-factor 1.7 --moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.0 --moe-router-dtype fp32 "
        "--moe-shared-expert-intermediate-size 40 "
    ),
    "glm4_moe_plain": (
        "--max-position-embeddings 64 --untie-embeddings-and-output-weights --norm-epsilon 1e-05 "
        "--kv-channels 12 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-base 1000000 "
        "--rotary-percent 0.75 --num-experts 8 --moe-ffn-hidden-size 20 --moe-router-topk 4 "
        "--moe-router-score-function sigmoid --moe-router-load-balancing-type none "
        "--moe-router-topk-scaling-factor 1.0 --moe-router-enable-expert-bias --moe-router-bias-update-rate "
        "0.0 --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 20 "
    ),
}
"""kind -> the flags besides `COMMON`, or in the place of a flag of `COMMON`."""
YARN = {
    "qwen3_yarn": (
        "--rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 16 --yarn-beta-fast 2.0 --yarn-beta-slow "
        "1.0 --mscale 1.803368801111 --mscale-all-dim 0.0 --no-yarn-correction-range-round-to-int "
    ),
    "gpt_oss": (
        "--rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 16 --yarn-beta-fast 8.0 --yarn-beta-slow "
        "1.0 --mscale 1.0 --mscale-all-dim 0.0 --no-yarn-correction-range-round-to-int "
    ),
    "ministral3": (
        "--rotary-scaling-factor 4.0 --yarn-original-max-position-embeddings 64 --yarn-beta-fast 8.0 --yarn-beta-slow "
        "1.0 --mscale 0.8 --mscale-all-dim 0.6 "
    ),
}
"""kind -> the flags of its YaRN, which Megatron-LM has since 0.19."""
INEXPRESSIBLE = ("llama_linear", "deepseek_v3", "moonlight", "olmoe", "minimax_m2")
if older_megatron.has_flags_of_positions():
    EXPECTED |= {kind: EXPECTED[kind] + flags for kind, flags in YARN.items()}
else:
    INEXPRESSIBLE += tuple(YARN)
NOT_COMMON = {"gpt_oss": ("--disable-bias-linear", "--swiglu")}
"""kind -> the flags of `COMMON` that it lacks."""


FLAGS, IMPOSSIBLE = f"flags of Megatron-LM {MEGATRON_LM}", f"not possible in Megatron-LM {MEGATRON_LM}"


def pairs(words: list[str]) -> set[tuple[str, ...]]:
    """Split an argument vector into flags with their values."""
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    return {tuple(words[a:b]) for a, b in zip(starts, [*starts[1:], len(words)], strict=True)}


def line_of(path: Path) -> str:
    return megatron_lm_usage(path)[FLAGS]


def model_of(directory: Path) -> ModelConfig:
    config = json.loads((directory / "config.json").read_text())
    return family_of(config).model_config(config)


GATED_DELTA = [kind for kind, (_, sizes) in hf_models.CONFIGS.items() if "linear_num_key_heads" in sizes]


@pytest.mark.parametrize("kind", [kind for kind in hf_models.CONFIGS if kind not in GATED_DELTA])
def test_the_flags_of_a_family_are_those_that_megatron_lm_was_seen_to_compute_it_with(hf_directory, kind):
    flags = megatron_flags(model_of(hf_directory(kind)))
    expected = {flag[0]: flag for flag in pairs(COMMON.split())} | {f[0]: f for f in pairs(EXPECTED[kind].split())}
    expected = {name: flag for name, flag in expected.items() if name not in NOT_COMMON.get(kind, ())}
    assert pairs(flags.arguments) == set(expected.values())
    assert bool(flags.not_expressible) == (kind in INEXPRESSIBLE)


@pytest.mark.parametrize("kind", GATED_DELTA)
def test_gated_delta_nets_are_said_to_be_stored_otherwise(hf_directory, kind):
    (reason,) = megatron_flags(model_of(hf_directory(kind))).not_expressible
    assert "gated_delta_net: Megatron-LM stores gated delta nets under other keys" in reason


IMPOSSIBLE_MODELS = {
    "llama3 factor": ({"rope_scaling_factor": 32.0}, "the llama3 rope factor 32.0: .* 8.0"),
    "gated gelu": ({"activation": "gelu"}, "a gated MLP with gelu"),
    "tanh gelu without biases": (
        {"activation": "gelu_tanh", "gated_linear_unit": False},
        "the tanh approximation of gelu without biases",
    ),
    "divided positions": ({"seq_len_interpolation_factor": 2.5}, "positions divided by 2.5: .* whole numbers only"),
    "softmax scale": ({"transformer": {"softmax_scale": 0.3}}, "softmax_scale=0.3"),
}
if not older_megatron.has_flags_of_positions():
    IMPOSSIBLE_MODELS |= {
        "divided positions": ({"seq_len_interpolation_factor": 4.0}, "positions divided by 4.0: .* does not reach"),
        "YaRN": ({"position_embedding_type": "yarn"}, "--position-embedding-type has no value for it"),
    }


@pytest.mark.parametrize("case", IMPOSSIBLE_MODELS)
def test_what_megatron_lm_cannot_be_given_is_one_message(case):
    changes, message = IMPOSSIBLE_MODELS[case]
    (reason,) = megatron_flags(ModelConfig(vocab_size=64, **changes)).not_expressible
    assert re.search(message, reason)
    assert not megatron_flags(ModelConfig(vocab_size=64, rope_scaling_factor=8.0)).not_expressible


@pytest.mark.parametrize(("activation", "unfused"), [("gelu", True), ("gelu_tanh", False)])
def test_the_flags_name_the_gelu_of_the_model(activation, unfused):
    flags = megatron_flags(ModelConfig(activation=activation, gated_linear_unit=False, add_bias_linear=True))
    assert not flags.not_expressible
    assert (("--no-bias-gelu-fusion",) in flags.flags) is unfused


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


def test_a_conversion_and_inspect_give_the_whole_line_to_paste(hf_directory, tmp_path):
    release = hf_to_megatron(hf_directory("qwen3"), tmp_path / "megatron", dtype=torch.bfloat16)
    usage = megatron_lm_usage(tmp_path / "megatron")
    assert list(usage) == [FLAGS] and describe(release)[FLAGS] == usage[FLAGS]
    found = pairs(shlex.split(usage[FLAGS]))
    assert found == pairs((COMMON + EXPECTED["qwen3"]).split()) | {
        ("--load", str(tmp_path / "megatron")),
        ("--ckpt-format", "torch_dist"),
        ("--bf16",),
    }


def test_the_line_names_the_tokenizer_that_the_checkpoint_carries_and_another_iteration_than_the_trackers(
    hf_directory, tmp_path
):
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
    assert "beta_fast=8 of YaRN" in describe(tmp_path / "megatron")[IMPOSSIBLE]


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_a_conversion_stores_the_layer_spec_whose_names_it_has(hf_directory, tmp_path, kind):
    args = stored_args(hf_to_megatron(hf_directory(kind), tmp_path / "megatron"))
    assert isinstance(args, argparse.Namespace)
    assert args.transformer_impl == "transformer_engine" and args.add_position_embedding is True
