# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The config.json of a Hugging Face model is read in full, or refused, and written back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hf_models
import models
import pytest
import transformers

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.conversion import converted_args
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import FAMILIES, family_of, family_of_model
from megatron_selfdistill.model.model_values import TRANSFORMER_DEFAULTS, architecture, differences

KINDS = list(hf_models.CONFIGS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_config_json_makes_the_same_transformers_model(written, kind):
    directory, original, _ = written(kind)
    config = hf_models.config_of(directory)
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
    "llama_4_scaling_beta",  # for positions that are not converted
    *"residual_dropout resid_pdrop embd_pdrop".split(),
}
# And what has no effect in a model of this kind: widths of dense layers where there are none, a window that is off.
WITHOUT_EFFECT = {
    "qwen2": {"sliding_window"},
    "qwen3": {"sliding_window"},
    "qwen3_yarn": {"sliding_window"},
    "qwen3_moe": {"intermediate_size", "sliding_window"},
    "qwen3_moe_mixed": {"sliding_window"},
    "deepseek_v3_plain": {"intermediate_size"},
    "smollm3": {"sliding_window", "no_rope_layer_interval"},
    "qwen2_moe": {"intermediate_size", "sliding_window"},
    "phi3": {"original_max_position_embeddings"},
    "glm4_moe_plain": {"intermediate_size"},
    "qwen3_next_unnormalised": {"intermediate_size", "full_attention_interval"},  # layer_types counts
    "qwen3_5_moe": {"intermediate_size"},
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
    config = hf_models.config_of(written(kind)[0])
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
        ("llama2", {"is_causal": False}, "is_causal=False: Megatron's attention is causal"),
        ("llama2", {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "Megatron has one configuration for all layers"),
        (
            "llama2",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "has sliding_attention as entry 1 of layer_types, but its other fields make that full_attention",
        ),
        ("llama3", {"original_max_position_embeddings": 4096}, "with original_max_position_embeddings=4096"),
        ("llama2", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama2", {"hidden_act": "gelu"}, "only silu"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "KeyError: 'factor'"),
        ("llama2", {"rope_theta": 10000.5}, "whole number"),
        ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per kind of layer"),
        ("llama2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "take the unquantised model"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0: expected 1 or more"),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4}, "use_sliding_window=false"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5}},
            "attention_factor=1.5 and factor=1.0",
        ),
        ("qwen3_yarn", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type='longrope'"),
        ("qwen3_yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.88}}, "attn_factor=0.88"),
        ("qwen3_window", {"layer_types": ["sliding_attention"] * 3}, "has None as entry 3 of layer_types"),
        ("qwen3_window", {"layer_types": ["chunked_attention"] * 4}, "has chunked_attention as entry 0 of layer_types"),
        ("qwen3_moe", {"decoder_sparse_step": 9}, "no layer with experts"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("gpt_oss", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("qwen3_5_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias=True"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias=True"),
        ("smollm3", {"attention_bias": True}, "attention_bias=True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "2 entries in no_rope_layers"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "has None as entry 3 of layer_types"),
        ("phi3", {"sliding_window": 0}, "sliding_window=0: expected 1 or more"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size 0"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer with experts: call it Qwen2ForCausalLM"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, "a sliding_window of 8 tokens"),
        (
            "ministral3",
            {"max_position_embeddings": 65},
            "llama_4_scaling_beta=0.1, by which queries grow from position 64",
        ),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "without llama_4_scaling_beta"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
        ("minimax_m2", {"shared_intermediate_size": 8}, "no shared experts"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list"),
        ("minimax_m2", {"rotary_dim": 4}, "rotary_dim=4 and partial_rotary_factor=0.6"),
        (
            "minimax_m2",
            {"rope_parameters": None, "partial_rotary_factor": None},
            "rotary_dim=6 and partial_rotary_factor=1.0",
        ),
        ("minimax_m2", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: Megatron does not clip"),
        ("olmoe", {"sliding_window": 8}, "sliding_window=8"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "longrope"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "moe_router_topk_scaling_factor 0"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "activation_func_clamp_value 0.0"),
        ("gpt_oss", {"hidden_act": "gelu"}, "only silu"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2]}}, "only mxfp4"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "only block-scaled fp8"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek_v3", {"num_experts_per_tok": 6}, "only a ratio of 2"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, "no layer with experts"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("glm4_moe", {"n_shared_experts": 0}, "Glm4MoeForCausalLM always has shared experts"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("glm4_moe", {"num_experts_per_tok": 6}, "only a ratio of 2"),
        ("glm4_moe", {"topk_group": 8}, "more than n_group=4"),
        ("glm4_moe", {"hidden_act": "gelu"}, "only silu"),
        (
            "glm4_moe",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            "partial_rotary_factor=0.5, but Megatron's YaRN rotates all channels",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "attention_factor": 2}},
            "attention_factor",
        ),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale_all_dim": 1}}, "no mscale"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate=False"),
        ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer with experts"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "has sliding_attention as entry 0 of layer_types"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "entry 3 of layer_types"),
        (
            "qwen3_5",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "partial_rotary_factor=0.25, but Megatron's YaRN rotates all channels",
        ),
        ("qwen3_5_moe", {"hidden_act": "gelu"}, "only silu"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused_in_one_line(written, kind, changes, words):
    config = hf_models.config_of(written(kind)[0])
    if "rope_scaling" in changes or "rope_theta" in changes:
        del config["rope_parameters"]
    with pytest.raises(ConfigError) as caught:
        family_of(config).model_config(config | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_inactive_sliding_window_is_no_sliding_window(written):
    config = hf_models.config_of(written("mistral")[0])
    longest = config["max_position_embeddings"]
    family = family_of(config)
    assert family.model_config(config | {"sliding_window": longest}) == family.model_config(config)
    del config["sliding_window"]  # transformers then assumes 4096
    found = family.model_config(config | {"max_position_embeddings": 8192})
    assert found.transformer == {"window_size": [4095, 0]}


@pytest.mark.parametrize(
    ("kind", "changes", "window", "layers"),
    [
        ("mistral", {"sliding_window": 8}, 8, [1, 1, 1, 1]),
        ("mixtral", {"sliding_window": 8}, 8, [1, 1, 1, 1]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, 8, [0, 0, 0, 1]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, 8, [1, 1, 1, 1]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}, None, None),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 3}, 8, [1, 1, 1, 1]),
    ],
)
def test_the_layers_with_a_window_are_those_of_transformers(written, kind, changes, window, layers):
    config = hf_models.config_of(written(kind)[0]) | {"sliding_window": 8, "layer_types": None} | changes
    family = family_of(config)
    found = family.model_config(config)
    arch = architecture(found)
    assert arch["window_attn_skip_freq"] == layers
    assert arch["window_size"] == (None if window is None else (window - 1, 0))
    assert not differences(family.model_config(family.describe(found)), found)
    if kind in ("qwen2", "qwen3"):  # transformers fills in the types of the layers itself
        given = {name: value for name, value in config.items() if name != "layer_types"}
        types = hf_models.config_class(kind)(**given).layer_types
        assert [int(kind == "sliding_attention") for kind in types] == (layers or [0] * 4)


def test_layer_types_in_the_text_model_of_mistral3_are_refused_as_transformers_ignores_them(written):
    text = hf_models.config_of(written("mistral_window")[0])
    mixed = text | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert type(transformers.Mistral3Config(text_config=dict(mixed)).text_config) is transformers.MistralConfig
    family = FAMILIES["Mistral3ForConditionalGeneration"]
    assert family.model_config({"text_config": text}).transformer == {"window_size": [6, 0]}
    with pytest.raises(ConfigError, match=r"has layer_types in its text_config, which transformers ignores"):
        family.model_config({"text_config": mixed})


def test_both_spellings_of_rope_are_read_alike(written):
    config = hf_models.config_of(written("llama3")[0])
    family = family_of(config)
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    older |= {"rope_theta": 500000, "rope_scaling": {**config["rope_parameters"], "type": "llama3"}}
    assert family.model_config(older) == family.model_config(config)
    assert family.model_config(config).rope_scaling_factor


LIKE_OTHERS = {
    "mistral": "LlamaForCausalLM",
    "seed_oss": "Qwen2ForCausalLM",
    "phi3": "MistralForCausalLM",
    "qwen3_5_moe": "Qwen3NextForCausalLM",
    "ministral3": "LlamaForCausalLM",
}
"""kind -> the earlier family that computes the same."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_known_by_its_architecture(written, kind):
    config = hf_models.config_of(written(kind)[0])
    model = family_of(config).model_config(config)
    assert family_of_model(model).architecture == LIKE_OTHERS.get(kind, config["architectures"][0])


@pytest.mark.parametrize(("key", "value"), [("softmax_type", "off-by-one"), ("layernorm_zero_centered_gamma", True)])
def test_a_transformer_key_that_config_json_cannot_say_is_refused(key, value):
    model = ModelConfig(vocab_size=100, transformer={key: value})
    with pytest.raises(ConfigError, match=key):
        FAMILIES["LlamaForCausalLM"].hf_config(model)


def test_without_architectures_the_model_type_decides():
    assert family_of({"model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


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
    windows = [
        {"window_size": [7, 0], "window_attn_skip_freq": 2},
        {"window_size": (7, 0), "window_attn_skip_freq": [int(layer % 2 == 0) for layer in range(short.num_layers)]},
    ]
    every, listed = (dataclasses.replace(short, transformer=window) for window in windows)
    assert architecture(every) == architecture(listed)
    none = dataclasses.replace(short, transformer={"window_size": [7, 0], "window_attn_skip_freq": 1})
    assert architecture(none) == architecture(short)
    assert differences(short, dataclasses.replace(short, kv_channels=8)) == {"kv_channels": (16, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_survives_the_arguments(kind):
    config = hf_models.hf_config(kind).to_dict() | {"architectures": []}  # the model_type names the family
    model = family_of(config).model_config(config)
    assert differences(architecture_from_args(converted_args(model, "bf16")), model) == {}


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "gelu"}, {"activation": "gelu_tanh"}, {"gated_linear_unit": False, "activation": "silu"}],
)
@pytest.mark.parametrize("kind", ["gqa", "tied", "moe"])
def test_activation_and_gate_survive_the_arguments(kind, changes):
    model = models.model_config(kind, **changes)
    assert differences(architecture_from_args(converted_args(model, "fp32")), model) == {}
