# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare a Hugging Face model with its Megatron model by the mapping tables: equal tensors and equal logits.

Every change that would make the models differ is refused or noticed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf import rules as rules_module
from megatron_selfdistill.model.hf.family import TRANSFORMER_DEFAULTS
from megatron_selfdistill.model.hf.mapping import (
    FAMILIES,
    PASSTHROUGH,
    Family,
    architecture,
    check_names,
    check_shapes,
    dequantise_blocks,
    differences,
    family_of,
    family_of_model,
    without_absent_layers,
)

KINDS = list(hf_models.CONFIGS)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], tuple[Path, Any, Tensor]]:
    """Kind -> (directory, transformers' model, its logits), each made once."""
    made: dict[str, tuple[Path, Any, Tensor]] = {}

    def make(kind: str) -> tuple[Path, Any, Tensor]:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            model = hf_models.write(kind, directory)
            made[kind] = directory, model, hf_models.hf_logits(model, hf_models.SEQUENCES)
        return made[kind]

    return make


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits_of_converted(directory: Path, mutation: str | None = None) -> Tensor:
    """Return the logits of this project's model, filled from a directory; check that rules and model agree."""
    _, model, rules, tensors = hf_models.read(directory)
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            model, tensors = MUTATIONS[mutation](patch, model, dict(tensors))
        chunks, grid = models.build(model, ParallelConfig())
        keys = hf_models.fill(chunks, rules, tensors)
    assert keys == {rule.megatron.key for rule in rules}
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_model_has_transformers_logits(ranks, written, kind):
    directory, _, expected = written(kind)
    (logits,) = ranks.run(logits_of_converted, directory, world_size=1)
    assert expected.std() > 1
    assert (logits - expected).abs().max() <= TOLERANCE


# Mistakes that a conversion could make.  Each takes (patch, model, tensors) and returns the last two.


def qkv_not_interleaved(patch, model, tensors):
    patch.setattr(rules_module.QueryGroups, "join", lambda self, qkv: torch.cat(qkv))
    return model, tensors


def gate_and_up_swapped(patch, model, tensors):
    patch.setattr(rules_module.Rows, "join", lambda self, parts: torch.cat(parts[::-1]))
    return model, tensors


def rope_base_changed(patch, model, tensors):
    return dataclasses.replace(model, rotary_base=model.rotary_base // 2), tensors


def rope_scaling_lost(patch, model, tensors):
    return dataclasses.replace(model, rope_scaling=False), tensors


def epsilon_changed(patch, model, tensors):
    return dataclasses.replace(model, layernorm_epsilon=10 * model.layernorm_epsilon), tensors


def changed_tensors(word: str, change: Callable[[Tensor], Tensor]):
    def mutate(patch, model, tensors):
        names = [name for name in tensors if word in name]
        assert names
        return model, tensors | {name: change(tensors[name]) for name in names}

    return mutate


def transformer_changed(**changes):
    return lambda patch, model, tensors: (
        dataclasses.replace(model, transformer=model.transformer | changes),
        tensors,
    )


def layers_swapped(patch, model, tensors):
    swap = {"model.layers.1.": "model.layers.2.", "model.layers.2.": "model.layers.1."}
    return model, {swap.get(name[:15], name[:15]) + name[15:]: tensor for name, tensor in tensors.items()}


MUTATIONS = {
    "qkv not interleaved": qkv_not_interleaved,
    "gate and up swapped": gate_and_up_swapped,
    "layers swapped": layers_swapped,
    "rope base changed": rope_base_changed,
    "rope scaling lost": rope_scaling_lost,
    "epsilon changed": epsilon_changed,
    "query bias lost": changed_tensors("q_proj.bias", torch.zeros_like),
    "key bias lost": changed_tensors("k_proj.bias", torch.zeros_like),
    "value bias lost": changed_tensors("v_proj.bias", torch.zeros_like),
    "query norm lost": changed_tensors("q_norm", torch.ones_like),
    "key norm lost": changed_tensors("k_norm", torch.ones_like),
    "expert bias lost": changed_tensors("e_score_correction_bias", torch.zeros_like),
    "latent norm lost": changed_tensors("kv_a_layernorm", torch.ones_like),
    "shared experts lost": changed_tensors("shared_experts.down_proj", torch.zeros_like),
    "groups of experts ignored": transformer_changed(moe_router_num_groups=None, moe_router_group_topk=None),
    "routed scaling ignored": transformer_changed(moe_router_topk_scaling_factor=None),
    "yarn ignored": transformer_changed(rope_type="rope"),
    "yarn's mscale ignored": transformer_changed(mscale=1.0),
    "yarn's mscale_all_dim ignored": transformer_changed(mscale_all_dim=0.0),
    "probabilities normalised": transformer_changed(moe_router_pre_softmax=False),
    "probabilities not normalised": transformer_changed(moe_router_pre_softmax=True),
}


@pytest.mark.parametrize(
    ("kind", "mutation"),
    [
        *(("llama3", name) for name in ["qkv not interleaved", "gate and up swapped", "layers swapped"]),
        *(("llama3", name) for name in ["rope base changed", "rope scaling lost", "epsilon changed"]),
        *(("qwen2", f"{name} bias lost") for name in ["query", "key", "value"]),
        *(("qwen3", f"{name} norm lost") for name in ["query", "key"]),
        *(("mixtral", name) for name in ["gate and up swapped", "probabilities not normalised"]),
        ("qwen3_moe_mixed", "probabilities normalised"),
        *(("deepseek_v3", name) for name in ["expert bias lost", "latent norm lost", "shared experts lost"]),
        *(("deepseek_v3", name) for name in ["groups of experts ignored", "routed scaling ignored"]),
        *(("deepseek_v3", f"yarn{name} ignored") for name in ["", "'s mscale", "'s mscale_all_dim"]),
        *(("deepseek_v3", name) for name in ["layers swapped", "rope base changed"]),
    ],
)
def test_comparing_logits_catches(ranks, written, kind, mutation):
    directory, _, expected = written(kind)
    (logits,) = ranks.run(logits_of_converted, directory, mutation, world_size=1)
    assert (logits - expected).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", KINDS)
def test_to_megatron_and_back_is_the_identity_bit_by_bit(written, kind, dtype):
    directory = written(kind)[0]
    _, _, rules, tensors = hf_models.read(directory)
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


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_in_megatron_is_filled_once(written, kind):
    _, _, rules, _ = hf_models.read(written(kind)[0])
    places = [rule.megatron for rule in rules]
    assert len(set(places)) == len(places)
    assert {rule.megatron.key for rule in rules if rule.vocabulary} <= {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }
    assert {rule.megatron.key.rpartition(".")[2] for rule in rules if rule.float32} <= {"expert_bias"}


def test_linear_qkv_holds_each_groups_queries_then_its_key_then_its_value():
    arrangement = rules_module.QueryGroups(num_attention_heads=4, num_query_groups=2, kv_channels=1)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20]), torch.tensor([100, 200])
    assert arrangement.join((q, k, v)).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_config_json_makes_the_same_transformers_model(written, kind):
    directory, original, _ = written(kind)
    config = config_of(directory)
    family = family_of(config)
    model = family.model_config(config)
    generated = json.loads(json.dumps(family.hf_config(model, dtype="float32")))
    assert differences(family.model_config(generated), model) == {}
    again = type(original)(type(original.config).from_dict(generated)).eval()
    again.load_state_dict(original.state_dict())
    sequences = hf_models.SEQUENCES[:1]
    assert hf_models.hf_logits(again, sequences).equal(hf_models.hf_logits(original, sequences))
    assert family.hf_config(model, dtype="float32", extra=config) == config


# What config.json says that no logit in evaluation depends on.
HARMLESS = {
    *"architectures model_type transformers_version dtype torch_dtype use_cache pretraining_tp".split(),
    *"initializer_range bos_token_id eos_token_id pad_token_id attention_dropout output_router_logits".split(),
    *"router_aux_loss_coef router_jitter_noise max_window_layers qk_head_dim type".split(),
}
# And what has no effect in a model of this kind: widths of dense layers where there are none, a window that is off.
WITHOUT_EFFECT = {
    "qwen2": {"sliding_window"},
    "qwen3": {"sliding_window"},
    "qwen3_moe": {"intermediate_size", "sliding_window"},
    "qwen3_moe_mixed": {"sliding_window"},
    "deepseek_v3_plain": {"intermediate_size"},
}


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value + 2
    if isinstance(value, float):
        return 1.5 * value + 0.25
    if isinstance(value, list):
        return [*value[1:], "sliding_attention"] if value and isinstance(value[0], str) else [*value, 0]
    return "something else" if isinstance(value, str) else 7


def is_noticed(family: Family, config: dict[str, Any], trial: dict[str, Any]) -> bool:
    """Return whether a changed config.json is refused or makes another model."""
    try:
        return bool(differences(family.model_config(trial), family.model_config(config)))
    except ConfigError:
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_config_json_is_read_or_refused_or_harmless(written, kind):
    config = config_of(written(kind)[0])
    family = family_of(config)
    overlooked = []
    for name in config.keys() - HARMLESS - WITHOUT_EFFECT.get(kind, set()):
        # A sliding window counts only where it is shorter than the model's longest sequence.
        around = config | {
            "use_sliding_window": {"sliding_window": 8, "layer_types": None, "max_window_layers": 1},
            "layer_types": {"sliding_window": 8},
        }.get(name, {})
        trials = {name: around | {name: changed(config[name])}}
        if isinstance(config[name], dict):
            inner = config[name]
            trials = {f"{name}.{k}": config | {name: inner | {k: changed(inner[k])}} for k in inner.keys() - HARMLESS}
        overlooked += [what for what, trial in trials.items() if not is_noticed(family, around, trial)]
    assert overlooked == []


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama2", {"attention_bias": True}, "attention_bias=True"),
        ("llama2", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama2", {"hidden_act": "gelu"}, "only silu"),
        ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("llama2", {"rope_theta": 10000.5}, "whole number"),
        ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per kind of layer"),
        ("llama2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "take the unquantised model"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq"),
        ("mistral", {"sliding_window": 32}, "active sliding_window of 32"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            "active",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("qwen3_moe", {"decoder_sparse_step": 9}, "no layer with experts"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek_v3", {"num_experts_per_tok": 6}, "only a ratio of 2"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, "no layer with experts"),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "attention_factor": 2}},
            "attention_factor",
        ),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale_all_dim": 1}}, "no mscale"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused_in_one_sentence(written, kind, changes, words):
    config = config_of(written(kind)[0])
    if "rope_scaling" in changes or "rope_theta" in changes:
        del config["rope_parameters"]
    with pytest.raises(ConfigError) as caught:
        family_of(config).model_config(config | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_inactive_sliding_window_is_no_sliding_window(written):
    config = config_of(written("mistral")[0])
    longest = config["max_position_embeddings"]
    family = family_of(config)
    assert family.model_config(config | {"sliding_window": longest}) == family.model_config(config)
    del config["sliding_window"]  # transformers then assumes 4096
    with pytest.raises(ConfigError, match="active sliding_window of 4096"):
        family.model_config(config | {"max_position_embeddings": 8192})


def test_both_spellings_of_rope_are_read_alike(written):
    config = config_of(written("llama3")[0])
    family = family_of(config)
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    older |= {"rope_theta": 500000, "rope_scaling": {**config["rope_parameters"], "type": "llama3"}}
    assert family.model_config(older) == family.model_config(config)
    assert family.model_config(config).rope_scaling


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_known_by_its_architecture(written, kind):
    config = config_of(written(kind)[0])
    model = family_of(config).model_config(config)
    expected = "LlamaForCausalLM" if kind == "mistral" else config["architectures"][0]
    assert family_of_model(model).architecture == expected


def test_a_model_that_no_family_can_describe_is_refused_naming_the_nearest():
    with pytest.raises(ConfigError) as caught:
        family_of_model(ModelConfig(vocab_size=100, qk_layernorm=True, normalization="LayerNorm"))
    assert "Qwen3ForCausalLM" in str(caught.value)
    assert "normalization would be 'RMSNorm' but the model has 'LayerNorm'" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("softmax_type", "off-by-one"), ("layernorm_zero_centered_gamma", True)])
def test_a_transformer_key_that_config_json_cannot_say_is_refused(key, value):
    model = ModelConfig(vocab_size=100, transformer={key: value})
    with pytest.raises(ConfigError, match=key):
        FAMILIES["LlamaForCausalLM"].hf_config(model)


def test_an_original_config_json_of_another_model_is_refused_showing_both(written):
    config = config_of(written("qwen3")[0])
    family = family_of(config)
    model = dataclasses.replace(family.model_config(config), rotary_base=10000)
    with pytest.raises(ConfigError, match="rotary_base would be 1000000 but the model has 10000"):
        family.hf_config(model, extra=config)


def test_further_keys_are_added_to_a_written_config_json():
    family = FAMILIES["LlamaForCausalLM"]
    config = family.hf_config(ModelConfig(vocab_size=100), extra={"eos_token_id": [7, 8]})
    assert config["eos_token_id"] == [7, 8] and config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("config", "got"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({}, "model_type None"),
    ],
)
def test_an_unknown_architecture_is_refused_listing_the_known_ones(config, got):
    with pytest.raises(ConfigError) as caught:
        family_of(config)
    assert got in str(caught.value) and all(name in str(caught.value) for name in FAMILIES)


def test_without_architectures_the_model_type_decides():
    assert family_of({"model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


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
        family, model, rules, _ = hf_models.read(written(kind)[0])
        found = [rule.megatron for rule in rules if rule.megatron.key.endswith(key)]
        apart = [(f"decoder.layers.{layer}.{key}", ()) for layer in range(4)]
        together = [(f"decoder.layers.{key}", (layer,)) for layer in range(4)]
        assert [(place.key, place.index) for place in found] == (together if stacked else apart)
    other = [rule.megatron.key for rule in family.rules(model, stacked=True)]
    assert f"decoder.layers.{key}" in other


# Multi-token prediction, as DeepSeek publishes it


def with_mtp_layer(directory: Path) -> tuple[list, dict[str, Tensor]]:
    """Return rules and tensors of a DeepSeek directory, with the tensors of layer 4 added under published names."""
    config = config_of(directory)
    family = family_of(config)
    tensors = hf_models.read(directory)[3]
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


def test_mtp_layers_are_carried_under_their_own_names(written):
    rules, tensors = with_mtp_layer(written("deepseek_v3")[0])
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
    keys = {rule.megatron.key for rule in rules}
    assert without_absent_layers(rules, keys) == rules
    assert without_absent_layers(rules, {k for k in keys if not k.startswith(PASSTHROUGH)}) == check_names(
        rules, without
    )


def test_carried_layers_are_in_no_model(ranks, written):
    config = config_of(written("deepseek_v3")[0])
    model = family_of(config).model_config(config)
    assert model.num_passthrough_mtp_layers == 1
    (names,) = ranks.run(parameter_names, dataclasses.replace(model, make_vocab_size_divisible_by=8), world_size=1)
    assert "embedding.word_embeddings.weight" in names and not any("mtp" in name for name in names)


def parameter_names(model: ModelConfig) -> list[str]:
    chunks, _ = models.build(model, ParallelConfig())
    return [name for name, _ in chunks[0].named_parameters()]


# FP8


@pytest.mark.parametrize("shape", [(256, 128), (7, 13), (130, 300), (1, 1)])
@pytest.mark.parametrize("block", [(128, 128), (4, 6)])
def test_dequantised_blocks_are_weight_times_scale(shape, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scale = torch.rand(rows, columns, generator=generator) + 0.5
    expected = torch.empty(shape, dtype=torch.float64)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = float(weight[i, j]) * scale[i // block[0], j // block[1]].double()
    got = dequantise_blocks(weight, scale, block)
    assert got.dtype == torch.float32 and got.equal(expected.float())


def test_scales_that_do_not_cover_the_weight_are_refused():
    with pytest.raises(ConfigError, match=r"needs scales of shape \[2, 3\], got \[2, 2\]"):
        dequantise_blocks(torch.zeros(200, 300).to(torch.float8_e4m3fn), torch.ones(2, 2), (128, 128))


def test_block_scaled_fp8_is_read_and_not_written():
    config = PUBLISHED["DeepSeek-V3"][0]
    family = family_of(config)
    written = family.hf_config(family.model_config(config), extra=config)
    assert "quantization_config" in config and "quantization_config" not in written
    assert written["torch_dtype"] == "bfloat16" and written["rope_scaling"] == config["rope_scaling"]


# Models that are published: their config.json, and how many numbers their tensors have

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "Mistral-7B-v0.3": (
        {
            "architectures": ["MistralForCausalLM"],
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7_248_023_552,
    ),
    "Qwen2.5-7B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "vocab_size": 151936,
            "hidden_size": 4096,
            "head_dim": 128,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
    "DeepSeek-V3": (
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671_026_419_200,  # expert biases included
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_authors_say(name):
    config, num_parameters = PUBLISHED[name]
    family = family_of(config)
    rules = family.rules(family.model_config(config))
    assert sum(torch.Size(rule.shape).numel() for rule in rules if not rule.is_passthrough) == num_parameters


def test_what_transformer_keys_mean_where_absent_is_what_megatron_says():
    defaults = {f.name: f.default for f in dataclasses.fields(MLATransformerConfig)}
    for name, default in TRANSFORMER_DEFAULTS.items():
        if name not in defaults:
            continue
        megatron = defaults[name]
        if name == "multi_latent_attention":  # of an ordinary TransformerConfig
            megatron = False
        assert getattr(megatron, "value", megatron) == default or getattr(megatron, "name", None) == default, name
    assert len(TRANSFORMER_DEFAULTS.keys() - defaults.keys()) == 0


def test_architecture_is_the_same_for_two_spellings_of_one_model():
    short = ModelConfig(vocab_size=100, hidden_size=64, num_attention_heads=4)
    long = dataclasses.replace(
        short,
        ffn_hidden_size=256,
        num_query_groups=4,
        kv_channels=16,
        moe_ffn_hidden_size=9,
        transformer={"moe_layer_freq": 1},
    )
    assert architecture(short) == architecture(long)
    assert differences(short, dataclasses.replace(short, kv_channels=8)) == {"kv_channels": (16, 8)}
