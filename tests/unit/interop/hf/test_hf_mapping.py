# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Hugging Face model and its Megatron model by the mapping tables have equal tensors and equal logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.mapping import check_names, check_shapes, family_of

KINDS = list(hf_models.CONFIGS)


def logits_of_converted(directory: Path, kind: str) -> list[Tensor]:
    """Return the logits of this project's model, filled from a directory, without a mistake and with each mistake.

    Check that rules and model agree.
    """
    found = []
    for mistake in (lambda model, tensors: (model, tensors), *MISTAKES.get(kind, ())):
        _, model, rules, tensors = hf_models.read(directory)
        model, tensors = mistake(model, tensors)
        chunks, grid = models.build(model, ParallelConfig())
        assert hf_models.fill(chunks, rules, tensors) == {rule.megatron.key for rule in rules}
        found.append(hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES))
    return found


@combinations(kind=KINDS, quick={"kind": hf_models.QUICK}, strength=1)
def test_the_converted_model_has_transformers_logits_and_mistakes_are_seen(ranks, written, kind):
    directory, _, expected = written(kind)
    logits, *wrong = ranks.run(logits_of_converted, directory, kind, world_size=1)[0]
    assert expected.std() > 1
    assert (logits - expected).abs().max() <= hf_models.logits_bound(kind)
    for number, found in enumerate(wrong):
        assert (found - expected).abs().max() > 5e-4, number


# Mistakes that a conversion could make.  Each takes the model and the tensors, and returns both.

Mistake = Callable[[ModelConfig, dict[str, Tensor]], tuple[ModelConfig, dict[str, Tensor]]]


def fields(**changes: Any) -> Mistake:
    """Change fields of the configuration, or else entries of ``transformer``."""
    known = {name: value for name, value in changes.items() if name in ModelConfig.__dataclass_fields__}
    others = {name: value for name, value in changes.items() if name not in known}
    return lambda model, tensors: (dataclasses.replace(model, **known, transformer=model.transformer | others), tensors)


def yarn(**changes: Any) -> Mistake:
    return lambda model, tensors: (dataclasses.replace(model, yarn=dataclasses.replace(model.yarn, **changes)), tensors)


def swapped(one: str, other: str) -> Mistake:
    """Exchange the tensors whose names differ in these parts alone."""

    def mutate(model: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
        assert any(one in name for name in tensors)
        names = {name: name.replace(one, other) if one in name else name.replace(other, one) for name in tensors}
        return model, {names[name]: tensor for name, tensor in tensors.items()}

    return mutate


def lost(word: str, change: Callable[[Tensor], Tensor] = torch.zeros_like) -> Mistake:
    """Replace the tensors whose names contain a word, by zeros unless a ``change`` is given."""

    def mutate(model: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
        names = [name for name in tensors if word in name]
        assert names
        return model, tensors | {name: change(tensors[name]) for name in names}

    return mutate


MISTAKES: dict[str, list[Mistake]] = {
    "llama3": [
        *(swapped("layers.1.", "layers.2."), fields(rotary_base=250000), fields(rope_scaling_factor=None)),
        fields(layernorm_epsilon=1e-5),
    ],
    "llama_linear": [fields(seq_len_interpolation_factor=None)],
    "qwen3_yarn": [
        *(fields(position_embedding_type="rope"), yarn(mscale=1.0), yarn(correction_range_round_to_int=True))
    ],
    "mistral_window": [fields(window_size=[7, 0])],
    "qwen3_window": [fields(window_attn_skip_freq=None), fields(window_attn_skip_freq=[0, 1, 0, 1])],
    "qwen2": [lost("v_proj.bias")],
    "qwen3": [lost("q_norm", torch.ones_like)],
    "smollm3": [fields(no_rope_freq=[1, 0, 1, 1])],
    "qwen2_moe": [fields(moe_router_pre_softmax=False), lost("shared_expert_gate", lambda gate: gate / 2)],
    "minimax_m2": [lost("k_norm", torch.ones_like), lost("e_score_correction_bias"), fields(rotary_percent=1.0)],
    "olmoe": [lost("k_norm", torch.ones_like)],
    "gpt_oss": [
        *(lost("sinks", lambda sinks: sinks.flip(0)), fields(window_attn_skip_freq=[0, 1, 0, 1]), lost("router.bias")),
        *(fields(activation_func_clamp_value=None), fields(glu_linear_offset=0.0), fields(activation="silu")),
    ],
    "deepseek_v3": [
        *(lost("e_score_correction_bias"), lost("kv_a_layernorm", torch.ones_like), fields(mscale=1.0)),
        *(lost("shared_experts.down_proj"), fields(moe_router_num_groups=None, moe_router_group_topk=None)),
        fields(moe_router_topk_scaling_factor=None),
    ],
    "moonlight": [fields(latent_layernorm_epsilon=None)],
    "glm4_moe": [fields(rotary_percent=1.0)],
    "qwen3_next": [
        *(lost("A_log"), fields(layernorm_zero_centered_gamma=False)),
        swapped("layers.0.linear_attn.", "layers.2.linear_attn."),
    ],
    "qwen3_5": [swapped("in_proj_b.weight", "in_proj_a.weight")],
}
"""The mistakes that are tried with each kind."""


@combinations(
    kind=list(KINDS),
    dtype=[torch.float32, torch.bfloat16, torch.float8_e4m3fn],
    quick={"dtype": ["torch.bfloat16"]},
    strength=1,
    full_strength=2,
)
def test_to_megatron_and_back_is_the_identity_bit_by_bit(written, kind, dtype):
    _, _, rules, tensors = hf_models.read(written(kind)[0])
    back: dict[str, Tensor] = {}
    for rule in rules:
        taken = [tensors[name].to(dtype) for name in rule.hf_names]
        tensor = rule.to_megatron(*taken)
        assert tuple(tensor.shape) == rule.shape and tensor.dtype == dtype
        assert tensor.numel() == sum(part.numel() for part in taken)
        for name, part in zip(rule.hf_names, rule.to_hf(tensor), strict=True):
            assert name not in back
            back[name] = part
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].view(torch.uint8).equal(tensor.to(dtype).view(torch.uint8)), name


def test_missing_unexpected_and_misshapen_tensors_are_named_and_companions_are_no_surprise(written):
    _, _, rules, tensors = hf_models.read(written("qwen2")[0])
    layer = "model.layers.2.self_attn"
    with pytest.raises(ConfigError) as caught:
        check_names(rules, tensors.keys() - {f"{layer}.k_proj.bias"} | {f"{layer}.o_proj.bias"})
    assert f"{layer}.k_proj.bias is missing" in str(caught.value)
    assert f"{layer}.o_proj.bias is unexpected" in str(caught.value)
    names = {*tensors, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    names.add("model.layers.0.mlp.up_proj.weight_scale_inv")
    assert check_names(rules, names) == rules
    with pytest.raises(ConfigError, match=r"missing\.weight_scale_inv is unexpected"):
        check_names(rules, {*names, "missing.weight_scale_inv"})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | {"model.norm.weight": (35,)}
    with pytest.raises(ConfigError, match=r"model.norm.weight has shape \[35\], expected \[36\]"):
        check_shapes(rules, shapes)
    qkv = next(rule for rule in rules if rule.megatron.key.endswith("linear_qkv.weight"))
    for convert in (lambda: qkv.to_megatron(*[torch.zeros(2)] * 3), lambda: qkv.to_hf(torch.zeros(2))):
        with pytest.raises(ConfigError, match=r"weight has shape \[2\], expected"):
            convert()


# Multi-token prediction, as DeepSeek publishes it


def with_mtp_layer(directory: Path) -> tuple[list, dict[str, Tensor]]:
    """Return rules and tensors of a DeepSeek or GLM directory, with the tensors of layer 4 under published names."""
    config, tensors = hf_models.config_of(directory), hf_models.read(directory)[3]
    assert config["num_hidden_layers"] == 4
    layer = {name.replace("layers.3.", "layers.4."): t + 1 for name, t in tensors.items() if "layers.3." in name}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    further = {"embed_tokens": (vocab, hidden), "shared_head.head": (vocab, hidden), "eh_proj": (hidden, 2 * hidden)}
    further |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    layer |= {f"model.layers.4.{name}.weight": torch.randn(shape) for name, shape in further.items()}
    family = family_of(config)
    return family.rules(family.model_config(config)), tensors | layer


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_mtp_layers_are_carried_under_their_own_names_and_a_directory_may_lack_all_of_one(written, kind):
    rules, tensors = with_mtp_layer(written(kind)[0])
    kept = check_names(rules, tensors)
    assert kept == rules
    check_shapes(kept, {name: tensor.shape for name, tensor in tensors.items()})
    carried = [rule for rule in kept if rule.is_passthrough]
    names = {name for name in tensors if ".layers.4." in name}
    assert {rule.hf_names for rule in carried} == {(name,) for name in names}
    for rule in carried:
        (name,) = rule.hf_names
        assert rule.megatron.key == PASSTHROUGH + name and rule.megatron.index == ()
        assert rule.to_megatron(tensors[name]).equal(tensors[name])
    assert sum(rule.float32 for rule in carried) == 1
    assert not any(rule.is_passthrough for rule in check_names(rules, tensors.keys() - names))
    with pytest.raises(ConfigError, match=r"model\.layers\.4\.eh_proj\.weight is missing"):
        check_names(rules, tensors.keys() - {"model.layers.4.eh_proj.weight"})
    copies = {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}  # GLM-4.6 has neither
    left = {name for rule in check_names(rules, tensors.keys() - copies) for name in rule.hf_names}
    assert left == tensors.keys() - copies


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5"])
def test_a_module_for_multi_token_prediction_is_carried_whole(written, kind):
    """As Qwen publishes it: one layer of attention, its projection and norms, under mtp."""
    directory = written(kind)[0]
    config = hf_models.config_of(directory)
    family, tensors = family_of(config), hf_models.read(directory)[3]
    attention = {name: t + 1 for name, t in tensors.items() if name.startswith("model.layers.3.")}
    carried = {name.replace("model.layers.3.", "mtp.layers.0."): tensor for name, tensor in attention.items()}
    hidden = config["hidden_size"]
    carried |= {f"mtp.{norm}.weight": torch.zeros(hidden) for norm in ("norm", "pre_fc_norm_embedding")}
    carried |= {"mtp.pre_fc_norm_hidden.weight": torch.ones(hidden), "mtp.fc.weight": torch.ones(hidden, 2 * hidden)}
    rules = family.rules(family.model_config(config))
    kept = check_names(rules, tensors | carried)
    check_shapes(kept, {name: tensor.shape for name, tensor in (tensors | carried).items()})
    assert {rule.hf_names for rule in kept if rule.is_passthrough} == {(name,) for name in carried}
    assert not any(rule.is_passthrough for rule in check_names(rules, tensors))
    with pytest.raises(ConfigError, match=r"mtp\.fc\.weight is missing"):
        check_names(rules, tensors.keys() | carried.keys() - {"mtp.fc.weight"})
