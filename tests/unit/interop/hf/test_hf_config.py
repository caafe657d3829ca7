# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The config.json of a Hugging Face model is read in full, or refused, and written back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hf_models
import pytest
import transformers
from tiers import combinations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.conversion import converted_args
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import FAMILIES, family_of, family_of_model
from megatron_selfdistill.model.model_values import TRANSFORMER_DEFAULTS, differences

KINDS = list(hf_models.CONFIGS)


@combinations(kind=KINDS, quick={"kind": hf_models.QUICK}, strength=1)
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
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_yarn", "qwen3_moe_mixed"), frozenset({"sliding_window"})),
    **dict.fromkeys(("qwen3_moe", "qwen2_moe"), frozenset({"intermediate_size", "sliding_window"})),
    **dict.fromkeys(("deepseek_v3_plain", "glm4_moe_plain", "qwen3_5_moe"), frozenset({"intermediate_size"})),
    "smollm3": {"sliding_window", "no_rope_layer_interval"},
    "phi3": {"original_max_position_embeddings"},
    "qwen3_next_unnormalised": {"intermediate_size", "full_attention_interval"},  # layer_types counts
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


SLIDING, FULL = ["sliding_attention"], ["full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0}
ONE_EXPERT = {"num_experts_per_tok": 1}
NAMED_OTHERWISE = {
    **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers"), "no layer with experts"),
    **{"routed_scaling_factor": "moe_router_topk_scaling_factor", "swiglu_limit": "activation_func_clamp_value"},
}
"""Fields that a refusal does not name -> what it names instead."""
REFUSED: dict[str, list[dict[str, Any]]] = {
    "llama2": [
        *({"is_causal": False}, {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}),
        *({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"type": "linear"}}),
        *({"rope_theta": 10000.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    "llama3": [
        {"original_max_position_embeddings": 4096},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
    ],
    "mistral": [{"sliding_window": 0}],
    "qwen2": [{"use_sliding_window": False, "layer_types": 4 * SLIDING}],
    "qwen3": [{"rope_scaling": {**YARN, "factor": 1.0, "attention_factor": 1.5}}],
    "qwen3_yarn": [
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_scaling": {**YARN, "attn_factor": 0.88}},
    ],
    "qwen3_window": [{"layer_types": 3 * SLIDING}, {"layer_types": ["chunked_attention"] * 4}],
    "qwen3_moe": [{"decoder_sparse_step": 9}, ONE_EXPERT],
    "mixtral": [ONE_EXPERT, {"quantization_config": {"quant_method": "mxfp4"}}],
    "smollm3": [{"no_rope_layers": [1, 0]}, {"layer_types": 3 * SLIDING}],
    "phi3": [
        {"sliding_window": 0},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    ],
    "qwen2_moe": [
        *({"shared_expert_intermediate_size": 0}, {"mlp_only_layers": [0, 1, 2, 3]}),
        {"use_sliding_window": True, "sliding_window": 8},
    ],
    "ministral3": [{"max_position_embeddings": 65}, {"rope_parameters": {"rope_type": "default"}}],
    "minimax_m2": [
        *({"scoring_func": "softmax"}, {"use_routing_bias": False}, {"use_qk_norm": False}, {"rotary_dim": 4}),
        *({"qk_norm_type": "per_head"}, {"shared_intermediate_size": 8}, {"attn_type_list": [1, 0, 1, 1]}, ONE_EXPERT),
        {"rope_parameters": None, "partial_rotary_factor": None},
    ],
    "olmoe": [{"clip_qkv": 8.0}, {"sliding_window": 8}],
    "deepseek_v3": [
        *({"routed_scaling_factor": 0}, {"moe_layer_freq": 2}, {"scoring_func": "softmax"}, {"topk_method": "greedy"}),
        *({"num_experts_per_tok": 6}, {"first_k_dense_replace": 4}),
        *({"rope_parameters": {**YARN, "attention_factor": 2}}, {"rope_parameters": {**YARN, "mscale_all_dim": 1}}),
        {"rope_parameters": {**YARN, "truncate": False}},
    ],
    "gpt_oss": [
        *({"swiglu_alpha": 1.0}, {"swiglu_limit": 0.0}, ONE_EXPERT),
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2]}},
    ],
    "glm4_moe": [
        *({"n_shared_experts": 0}, ONE_EXPERT, {"num_experts_per_tok": 6}, {"topk_group": 8}),
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}},
    ],
    "qwen3_next": [
        *({"attn_output_gate": False}, {"mlp_only_layers": [0, 1, 2, 3]}),
        *({"layer_types": 4 * SLIDING}, {"layer_types": 3 * FULL}),
    ],
    "qwen3_5": [{"rope_parameters": YARN}],
    "qwen3_5_moe": [ONE_EXPERT],
}
"""Kind -> changes of its config.json that Megatron would compute otherwise, beside those of the test above."""


@pytest.mark.parametrize("kind", REFUSED)
def test_what_megatron_would_compute_otherwise_is_refused_in_one_line_by_a_field(written, kind):
    for changes in REFUSED[kind]:
        config = hf_models.config_of(written(kind)[0])
        if "rope_scaling" in changes or "rope_theta" in changes:
            del config["rope_parameters"]
        with pytest.raises(ConfigError) as caught:
            family_of(config).model_config(config | changes)
        inner = [name for value in changes.values() if isinstance(value, dict) for name in value]
        names = [NAMED_OTHERWISE.get(name, name) for name in (*changes, *inner)]
        message = str(caught.value)
        assert "\n" not in message and any(name in message for name in (*names, *changes)), changes


def test_an_inactive_sliding_window_is_no_sliding_window(written):
    config = hf_models.config_of(written("mistral")[0])
    longest = config["max_position_embeddings"]
    family = family_of(config)
    assert family.model_config(config | {"sliding_window": longest}) == family.model_config(config)
    del config["sliding_window"]  # transformers then assumes 4096
    found = family.model_config(config | {"max_position_embeddings": 8192})
    assert found.transformer == {"window_size": [4095, 0]}


def test_layer_types_in_the_text_model_of_mistral3_are_refused_as_transformers_ignores_them(written):
    text = hf_models.config_of(written("mistral_window")[0])
    mixed = text | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert type(transformers.Mistral3Config(text_config=dict(mixed)).text_config) is transformers.MistralConfig
    family = FAMILIES["Mistral3ForConditionalGeneration"]
    assert family.model_config({"text_config": text}).transformer == {"window_size": [6, 0]}
    with pytest.raises(ConfigError, match=r"has layer_types in its text_config, which transformers ignores"):
        family.model_config({"text_config": mixed})


LIKE_OTHERS = {"mistral": "LlamaForCausalLM", "ministral3": "LlamaForCausalLM", "seed_oss": "Qwen2ForCausalLM"}
LIKE_OTHERS |= {"phi3": "MistralForCausalLM", "qwen3_5_moe": "Qwen3NextForCausalLM"}
"""kind -> the earlier family that computes the same."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_known_by_its_architecture_and_survives_the_arguments(written, kind):
    config = hf_models.config_of(written(kind)[0])
    family = family_of(config)
    model = family.model_config(config)
    assert family_of_model(model).architecture == LIKE_OTHERS.get(kind, config["architectures"][0])
    assert family_of({"model_type": config["model_type"]}).architecture == family.architecture
    assert differences(architecture_from_args(converted_args(model, "bf16")), model) == {}


def test_a_transformer_key_that_config_json_cannot_say_is_refused():
    for key, value in (("softmax_type", "off-by-one"), ("layernorm_zero_centered_gamma", True)):
        with pytest.raises(ConfigError, match=key):
            FAMILIES["LlamaForCausalLM"].hf_config(ModelConfig(vocab_size=100, transformer={key: value}))


def test_what_transformer_keys_mean_where_absent_is_what_megatron_says():
    megatrons = {f.name: f.default for f in dataclasses.fields(MLATransformerConfig)}
    megatrons["multi_latent_attention"] = False  # of an ordinary TransformerConfig
    for name, default in TRANSFORMER_DEFAULTS.items():
        found = megatrons[name]
        assert default in (getattr(found, "value", found), getattr(found, "name", found)), name
