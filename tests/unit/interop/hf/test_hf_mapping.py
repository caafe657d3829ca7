# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Hugging Face model and its Megatron model by the mapping tables have equal tensors and equal logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import hf_models
import models
import pytest
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import copy

from conditioning import CHANGE, ROUNDINGS, UNIT_ROUNDOFF

from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf import decoder
from megatron_selfdistill.interop.hf import rules as rules_module
from megatron_selfdistill.interop.hf.mapping import check_names, check_shapes, family_of

KINDS = list(hf_models.CONFIGS)
ALIKE = {"deepseek_v3_plain", "glm4_moe_plain", "moonlight", "olmoe", "qwen2_moe"}
QUICK = [kind for kind in KINDS if kind not in ALIKE]
"""All but kinds whose rules are those of another one."""


def logits_of_converted(directory: Path, mistakes: list[str]) -> list[Tensor]:
    """Return the logits of this project's model, filled from a directory, without a mistake and with each mistake."""
    return [logits_with(directory, mistake) for mistake in (None, *mistakes)]


def logits_with(directory: Path, mistake: str | None) -> Tensor:
    """Return the logits with a mistake; check that rules and model agree."""
    _, model, rules, tensors = hf_models.read(directory)
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            model, tensors = MUTATIONS[mistake](patch, model, dict(tensors))
        chunks, grid = models.build(model, ParallelConfig())
        keys = hf_models.fill(chunks, rules, tensors)
    assert keys == {rule.megatron.key for rule in rules}
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


@combinations(kind=KINDS, quick={"kind": QUICK}, strength=1)
def test_the_converted_model_has_transformers_logits_and_mistakes_are_seen(ranks, written, kind):
    directory, _, expected = written(kind)
    mistakes = MISTAKES.get(kind, [])
    logits, *wrong = ranks.run(logits_of_converted, directory, mistakes, world_size=1)[0]
    assert expected.std() > 1
    assert (logits - expected).abs().max() <= hf_models.logits_bound(kind)
    for mistake, found in zip(mistakes, wrong, strict=True):
        assert (found - expected).abs().max() > 5e-4, mistake


# Mistakes that a conversion could make.  Each takes (patch, model, tensors) and returns the last two.


def qkv_not_interleaved(patch, model, tensors):
    patch.setattr(decoder.HeadGroups, "join", lambda self, qkv: torch.cat(qkv))
    return model, tensors


def gate_and_up_swapped(patch, model, tensors):
    patch.setattr(rules_module.Rows, "join", lambda self, parts: torch.cat(parts[::-1]))
    return model, tensors


def gate_and_up_not_interleaved(patch, model, tensors):
    right = rules_module.FusedExperts.join
    patch.setattr(rules_module.FusedExperts, "join", lambda self, t: right(rules_module.FusedExperts(False), t))
    return model, tensors


def rope_base_changed(patch, model, tensors):
    return dataclasses.replace(model, rotary_base=model.rotary_base // 2), tensors


def rope_scaling_lost(patch, model, tensors):
    return dataclasses.replace(model, rope_scaling_factor=None), tensors


def model_changed(**changes):
    return lambda patch, model, tensors: (dataclasses.replace(model, **changes), tensors)


def yarn_changed(**changes):
    return lambda patch, model, tensors: (
        dataclasses.replace(model, yarn=dataclasses.replace(model.yarn, **changes)),
        tensors,
    )


def epsilon_changed(patch, model, tensors):
    return dataclasses.replace(model, layernorm_epsilon=10 * model.layernorm_epsilon), tensors


def changed_tensors(word: str, change: Callable[[Tensor], Tensor]):
    def mutate(patch, model, tensors):
        names = [name for name in tensors if word in name]
        assert names
        return model, tensors | {name: change(tensors[name]) for name in names}

    return mutate


def transformer_changed(**changes):
    return lambda patch, model, tensors: (dataclasses.replace(model, transformer=model.transformer | changes), tensors)


def layers_swapped(patch, model, tensors):
    swap = {"model.layers.1.": "model.layers.2.", "model.layers.2.": "model.layers.1."}
    return model, {swap.get(name[:15], name[:15]) + name[15:]: tensor for name, tensor in tensors.items()}


def linear_layers_swapped(patch, model, tensors):
    """Exchange the gated delta nets of the layers 0 and 2, and nothing else."""
    swap = {"model.layers.0.linear_attn.": "model.layers.2.linear_attn."}
    swap |= {other: name for name, other in swap.items()}
    return model, {swap.get(name[:27], name[:27]) + name[27:]: tensor for name, tensor in tensors.items()}


def beta_and_alpha_swapped(patch, model, tensors):
    swap = {"in_proj_b.weight": "in_proj_a.weight", "in_proj_a.weight": "in_proj_b.weight"}
    return model, {name: tensors[name[:-16] + swap.get(name[-16:], name[-16:])] for name in tensors}


def gate_not_interleaved(patch, model, tensors):
    """Take transformers' q as query heads followed by their gates."""

    def join(self, qkv):
        per_group = [part.reshape(self.num_query_groups, -1, *part.shape[1:]) for part in qkv]
        return torch.cat(per_group, dim=1).flatten(0, 1)

    patch.setattr(decoder.GatedQueryGroups, "join", join)
    return model, tensors


def sections_below_each_other(word):
    """Take tensors whose rows are grouped by key head as sections one below the other."""

    def mutate(patch, model, tensors):
        join = decoder.HeadGroups.join

        def not_grouped(self, parts):
            is_meant = (parts[0].dim() == 3) == (word == "conv1d")
            return torch.cat(parts) if is_meant else join(self, parts)

        patch.setattr(decoder.HeadGroups, "join", not_grouped)
        return model, tensors

    return mutate


MUTATIONS = {
    "shared expert's gate halved": changed_tensors("shared_expert_gate", lambda gate: gate / 2),
    "rope in the other layers": transformer_changed(no_rope_freq=[1, 0, 1, 1]),
    "qkv not interleaved": qkv_not_interleaved,
    "gate and up swapped": gate_and_up_swapped,
    "layers swapped": layers_swapped,
    "rope base changed": rope_base_changed,
    "rope scaling lost": rope_scaling_lost,
    "all channels rotated": model_changed(rotary_percent=1.0),
    "epsilon of latents lost": model_changed(latent_layernorm_epsilon=None),
    "positions not divided": model_changed(seq_len_interpolation_factor=None),
    "yarn of heads ignored": model_changed(position_embedding_type="rope"),
    "yarn's attention factor ignored": yarn_changed(mscale=1.0),
    "yarn's range rounded": yarn_changed(correction_range_round_to_int=True),
    "epsilon changed": epsilon_changed,
    "value bias lost": changed_tensors("v_proj.bias", torch.zeros_like),
    "query norm lost": changed_tensors("q_norm", torch.ones_like),
    "key norm lost": changed_tensors("k_norm", torch.ones_like),
    "expert bias lost": changed_tensors("e_score_correction_bias", torch.zeros_like),
    "router bias lost": changed_tensors("router.bias", torch.zeros_like),
    "sinks swapped": changed_tensors("sinks", lambda sinks: sinks.flip(0)),
    "gate and up not interleaved": gate_and_up_not_interleaved,
    "clamp lost": transformer_changed(activation_func_clamp_value=None),
    "up projection without offset": transformer_changed(glu_linear_offset=0.0),
    "other activation": lambda patch, model, tensors: (dataclasses.replace(model, activation="silu"), tensors),
    "latent norm lost": changed_tensors("kv_a_layernorm", torch.ones_like),
    "shared experts lost": changed_tensors("shared_experts.down_proj", torch.zeros_like),
    "groups of experts ignored": transformer_changed(moe_router_num_groups=None, moe_router_group_topk=None),
    "routed scaling ignored": transformer_changed(moe_router_topk_scaling_factor=None),
    "yarn's mscale ignored": transformer_changed(mscale=1.0),
    "window one token longer": transformer_changed(window_size=[7, 0]),
    "window in every layer": transformer_changed(window_attn_skip_freq=None),
    "window in other layers": transformer_changed(window_attn_skip_freq=[0, 1, 0, 1]),
    "probabilities normalised": transformer_changed(moe_router_pre_softmax=False),
    "output gate not interleaved": gate_not_interleaved,
    "projections not grouped": sections_below_each_other("in_proj"),
    "convolution not grouped": sections_below_each_other("conv1d"),
    "decay lost": changed_tensors("A_log", torch.zeros_like),
    "norms not around zero": transformer_changed(layernorm_zero_centered_gamma=False),
    "layers of one kind swapped": linear_layers_swapped,
    "beta and alpha swapped": beta_and_alpha_swapped,
}


MISTAKES = {
    "llama3": [
        *("qkv not interleaved", "gate and up swapped", "layers swapped"),
        *("rope base changed", "rope scaling lost", "epsilon changed"),
    ],
    "llama_linear": ["positions not divided"],
    "qwen3_yarn": ["yarn of heads ignored", "yarn's attention factor ignored", "yarn's range rounded"],
    "mistral_window": ["window one token longer"],
    "qwen3_window": ["window in every layer", "window in other layers"],
    "qwen2": ["value bias lost"],
    "qwen3": ["query norm lost"],
    "smollm3": ["rope in the other layers"],
    "qwen2_moe": ["probabilities normalised", "shared expert's gate halved"],
    "minimax_m2": ["key norm lost", "expert bias lost", "all channels rotated"],
    "olmoe": ["key norm lost"],
    "gpt_oss": [
        *("sinks swapped", "window in other layers", "clamp lost", "up projection without offset"),
        *("gate and up not interleaved", "other activation", "router bias lost"),
    ],
    "deepseek_v3": [
        *("expert bias lost", "latent norm lost", "shared experts lost"),
        *("groups of experts ignored", "routed scaling ignored", "yarn's mscale ignored"),
    ],
    "moonlight": ["epsilon of latents lost"],
    "glm4_moe": ["all channels rotated"],
    "qwen3_next": [
        *("output gate not interleaved", "projections not grouped", "convolution not grouped", "decay lost"),
        *("norms not around zero", "layers of one kind swapped"),
    ],
    "qwen3_5": ["beta and alpha swapped"],
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


def test_linear_qkv_holds_each_groups_queries_then_its_key_then_its_value():
    arrangement = decoder.HeadGroups(2, ((2,), (1,), (1,)))
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20]), torch.tensor([100, 200])
    assert arrangement.join((q, k, v)).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_missing_and_unexpected_tensors_are_named(written):
    _, _, rules, tensors = hf_models.read(written("qwen2")[0])
    names = tensors.keys() - {"model.layers.2.self_attn.k_proj.bias"} | {"model.layers.2.self_attn.o_proj.bias"}
    with pytest.raises(ConfigError) as caught:
        check_names(rules, names)
    assert "model.layers.2.self_attn.k_proj.bias is missing" in str(caught.value)
    assert "model.layers.2.self_attn.o_proj.bias is unexpected" in str(caught.value)


def test_a_tensor_of_another_shape_is_named(written):
    _, _, rules, tensors = hf_models.read(written("llama2")[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with pytest.raises(ConfigError, match=r"model.norm.weight has shape \[35\], expected \[36\]"):
        check_shapes(rules, shapes | {"model.norm.weight": (35,)})
    qkv = next(rule for rule in rules if rule.megatron.key.endswith("linear_qkv.weight"))
    with pytest.raises(ConfigError, match=r"q_proj.weight has shape \[2\], expected \[40, 36\]"):
        qkv.to_megatron(*[torch.zeros(2)] * 3)
    with pytest.raises(ConfigError, match=r"linear_qkv.weight has shape \[2\], expected \[120, 36\]"):
        qkv.to_hf(torch.zeros(2))


def test_companions_and_duplicates_in_a_directory_are_no_surprise(written):
    _, _, rules, tensors = hf_models.read(written("llama3")[0])
    names = {*tensors, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    names.add("model.layers.0.mlp.up_proj.weight_scale_inv")
    assert check_names(rules, names) == rules
    with pytest.raises(ConfigError, match=r"missing\.weight_scale_inv is unexpected"):
        check_names(rules, {*names, "missing.weight_scale_inv"})


def test_layers_have_their_own_keys_only_where_dense_and_moe_layers_are_mixed(written):
    key = "self_attention.linear_qkv.weight"
    for kind, stacked in [("qwen3_moe", True), ("qwen3_moe_mixed", False)]:
        _, _, rules, _ = hf_models.read(written(kind)[0])
        found = [rule.megatron for rule in rules if rule.megatron.key.endswith(key)]
        apart = [(f"decoder.layers.{layer}.{key}", ()) for layer in range(4)]
        together = [(f"decoder.layers.{key}", (layer,)) for layer in range(4)]
        assert [(place.key, place.index) for place in found] == (together if stacked else apart)


# Multi-token prediction, as DeepSeek publishes it


def with_mtp_layer(directory: Path) -> tuple[list, dict[str, Tensor]]:
    """Return rules and tensors of a DeepSeek or GLM directory, with the tensors of layer 4 under published names."""
    config = hf_models.config_of(directory)
    family = family_of(config)
    tensors = hf_models.read(directory)[3]
    assert config["num_hidden_layers"] == 4
    layer = {name.replace("layers.3.", "layers.4."): t + 1 for name, t in tensors.items() if "layers.3." in name}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    for name, shape in {
        "embed_tokens": (vocab, hidden),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (vocab, hidden),
    }.items():
        layer[f"model.layers.4.{name}.weight"] = torch.randn(shape)
    return family.rules(family.model_config(config)), tensors | layer


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_mtp_layers_are_carried_under_their_own_names(written, kind):
    rules, tensors = with_mtp_layer(written(kind)[0])
    kept = check_names(rules, tensors)
    check_shapes(kept, {name: tensor.shape for name, tensor in tensors.items()})
    carried = [rule for rule in kept if rule.is_passthrough]
    assert {rule.hf_names for rule in carried} == {(name,) for name in tensors if ".layers.4." in name}
    for rule in carried:
        (name,) = rule.hf_names
        assert rule.megatron.key == PASSTHROUGH + name and rule.megatron.index == ()
        assert rule.to_megatron(tensors[name]).equal(tensors[name])
    assert sum(rule.float32 for rule in carried) == 1


def test_a_directory_may_lack_all_of_an_mtp_layer_but_not_a_part(written):
    rules, tensors = with_mtp_layer(written("deepseek_v3")[0])
    without = {name for name in tensors if ".layers.4." not in name}
    assert not any(rule.is_passthrough for rule in check_names(rules, without))
    with pytest.raises(ConfigError, match=r"model\.layers\.4\.eh_proj\.weight is missing"):
        check_names(rules, tensors.keys() - {"model.layers.4.eh_proj.weight"})
    copies = {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}  # GLM-4.6 has neither
    kept = {name for rule in check_names(rules, tensors.keys() - copies) for name in rule.hf_names}
    assert kept == tensors.keys() - copies
    assert check_names(rules, tensors) == rules


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


def test_carried_layers_are_in_no_model(ranks, written):
    config = hf_models.config_of(written("deepseek_v3")[0])
    model = family_of(config).model_config(config)
    assert model.num_passthrough_mtp_layers == 1
    (names,) = ranks.run(parameter_names, dataclasses.replace(model, make_vocab_size_divisible_by=8), world_size=1)
    assert "embedding.word_embeddings.weight" in names and not any("mtp" in name for name in names)


def parameter_names(model: ModelConfig) -> list[str]:
    chunks, _ = models.build(model, ParallelConfig())
    return [name for name, _ in chunks[0].named_parameters()]


QUICK = ("qwen3", "qwen3_5")
ROUTED_OTHERWISE = "qwen3_next_unnormalised"
"""A model whose routers choose other experts after a change of the weights: its logits jump."""


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full)
        for kind in hf_models.CONFIGS
        if kind != ROUTED_OTHERWISE
    ],
)
def test_three_roundings_of_the_weights_move_the_logits_by_at_most_the_bound(tmp_path, kind):
    model = hf_models.write(kind, tmp_path)
    changed, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in changed.parameters():
        weight.mul_(1 + CHANGE / 4 * (2 * torch.randint(0, 2, weight.shape, generator=draw) - 1))
    logits = (hf_models.hf_logits(one, hf_models.SEQUENCES) for one in (model, changed))
    moved = (torch.sub(*logits)).abs().max().item() / (CHANGE / 4) * UNIT_ROUNDOFF
    assert hf_models.logits_bound(kind) / 10 < ROUNDINGS * moved < hf_models.logits_bound(kind)
