# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron Core gets the architecture of the configuration; combinations that it computes wrongly are refused."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from tiers import combinations

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core.models.common.embeddings.rope_utils as rope_utils
import megatron.core.transformer.transformer_config as megatron_config
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, YarnConfig, load
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import architecture
from megatron_selfdistill.model.architecture import layer_spec, padded_vocab_size, transformer_config
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.known_faults import known_faults, refuse_known_faults
from megatron_selfdistill.model.layers import RMSNorm
from megatron_selfdistill.model.local_attention import CoreAttention

DENSE = ModelConfig(num_layers=4)
MOE = ModelConfig(num_layers=4, num_moe_experts=4)
SHIPPED_MODELS = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def configured(model: ModelConfig = DENSE, parallel: dict | None = None, **transformer) -> TransformerConfig:
    model = dataclasses.replace(model, transformer=transformer)
    optimizer = OptimizerConfig(precision="fp32")
    return transformer_config(model, ParallelConfig(**parallel or {}), optimizer, ScheduleConfig())


PP2_VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
TWO_GROUPS = dataclasses.replace(DENSE, num_attention_heads=4, num_query_groups=2)
GELU = dataclasses.replace(DENSE, activation="gelu", gated_linear_unit=False)
GATED_DELTA = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2}
Z_LOSS = {"moe_z_loss_coeff": 0.01}
YARN = ModelConfig(num_layers=4, position_embedding_type="yarn", yarn=YarnConfig(rotary_scaling_factor=4.0))
ALL_HEADS = dataclasses.replace(DENSE, qk_layernorm_all_heads=True)
SINCE_0_18 = older_megatron.version() >= (0, 18)
FUSER = {"use_transformer_engine_op_fuser": True}
RANK_CAPACITY = FUSER | {"moe_expert_rank_capacity_factor": 1.0, "moe_flex_dispatcher_backend": "hybridep"}
# sentence -> ways of meeting it: (model, parallel, model.transformer)
REFUSED: dict[str, list[tuple[ModelConfig, dict, dict]]] = {
    "interleaved pipelining over 2 stages with batch_p2p_comm": [(DENSE, PP2_VPP2, {"batch_p2p_comm": True})],
    "on gloo, overlap_p2p_comm sends buffers": [
        (DENSE, PP2_VPP2, {"overlap_p2p_comm": True, "deallocate_pipeline_outputs": True})
    ],
    "multi-latent attention without Transformer Engine": [
        (DENSE, {"tensor_model_parallel_size": 2}, {"multi_latent_attention": True})
    ],
    "latent attention ignores no_rope_freq": [
        (DENSE, {}, {"multi_latent_attention": True, "no_rope_freq": [1] + [0] * (DENSE.num_layers - 1)})
    ],
    "qk_layernorm_all_heads is an RMSNorm of ordinary attention": [
        (ALL_HEADS, {}, {"multi_latent_attention": True}),
        (dataclasses.replace(ALL_HEADS, normalization="LayerNorm"), {}, {}),
    ],
    "tensor-parallel ranks are copied": [
        (dataclasses.replace(ALL_HEADS, num_query_groups=1), {"tensor_model_parallel_size": 2}, {})
    ],
    "calculate_per_token_loss multiplies router losses": [(DENSE, {}, {"calculate_per_token_loss": True})],
    "defer_embedding_wgrad_compute keeps the gradients": [
        (
            DENSE,
            {"pipeline_model_parallel_size": 2},
            {"defer_embedding_wgrad_compute": True, "gradient_accumulation_fusion": True},
        )
    ],
    "tp_comm_overlap needs microbatches of one length": [(DENSE, TP2_SP, {"tp_comm_overlap": True})],
    "multi-token-prediction layers are not trained": [(DENSE, {}, {"mtp_num_layers": 1})],
    "expected [left, 0], where left is the number of tokens before": [
        (DENSE, {}, {"window_size": [8, 8]}),
        (DENSE, {}, {"window_size": [-1, 0]}),
        (DENSE, {}, {"window_size": [8]}),
    ],
    "window_attn_skip_freq=0: expected at least 1": [(DENSE, {}, {"window_size": [8, 0], "window_attn_skip_freq": 0})],
    "window_attn_skip_freq=[1, 0, 1]: expected one entry for each": [
        (DENSE, {}, {"window_size": [8, 0], "window_attn_skip_freq": [1, 0, 1]})
    ],
    "apply_rope_fusion rotates packed sequences as if": [
        (DENSE, {}, {"apply_rope_fusion": True, "rotary_interleaved": True})
    ],
    "apply_rope_fusion drops YaRN's factor of queries and keys": [(YARN, {}, {"apply_rope_fusion": True})],
    "the fused kernel ignores activation_func_clamp_value": [
        (DENSE, {}, {"bias_activation_fusion": True, "activation_func_clamp_value": 7.0})
    ],
    "perform_initialization=false leaves weights unmarked": [
        (DENSE, {"tensor_model_parallel_size": 2}, {"perform_initialization": False})
    ][SINCE_0_18:],
    "dropout makes the trained student differ": [
        (DENSE, {}, {"hidden_dropout": 0.1}),
        (DENSE, {}, {"attention_dropout": 0.1}),
    ],
    "moe_expert_capacity_factor drops tokens": [
        (MOE, {}, {"moe_expert_capacity_factor": 1.0}),
        *[(MOE, {}, RANK_CAPACITY)] * SINCE_0_18,
    ],
    "mlp_chunks_for_training routes padding": [(MOE, {}, {"mlp_chunks_for_training": 2})] * SINCE_0_18,
    "use_transformer_engine_op_fuser ignores": [
        (DENSE, {}, FUSER | {"activation_func_clamp_value": 7.0}),
        (DENSE, {}, FUSER | {"glu_linear_offset": 1.0}),
    ][: 2 * SINCE_0_18],
    "moe_router_load_balancing_type=global_aux_loss has a gradient that shrinks": [
        (MOE, {}, {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01}),
        (
            MOE,
            {},
            {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.01, 0.01]},
        ),
    ],
    "experimental_attention_variant has layers here for gated_delta_net only": [
        (DENSE, {}, {"multi_latent_attention": True, "experimental_attention_variant": "dsa"})
    ],
    "a gated delta net computes with silu": [(GELU, {}, GATED_DELTA)],
    "Gated delta net does not support context parallel": [(DENSE, CP2, GATED_DELTA)],
    "attention_output_gate needs whole query groups": [
        (TWO_GROUPS, {"tensor_model_parallel_size": 4}, {"attention_output_gate": True})
    ],
    "moe_z_loss_coeff averages over each rank's own real tokens": [(MOE, CP2, Z_LOSS), (MOE, TP2_SP, Z_LOSS)],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_megatron_gets_wrong_is_refused_with_a_sentence(sentence, monkeypatch):
    monkeypatch.setattr(megatron_config, "is_te_min_version", lambda *_: True)  # Megatron's own checks come first
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for model, parallel, transformer in REFUSED[sentence]:
        with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
            configured(model, parallel, **transformer)
        assert "\n" not in str(caught.value)


WITH_TRANSFORMER_ENGINE: dict[str, list[dict]] = {
    "has no sliding window for cp_comm_type=p2p": [
        {"window_size": (8, 0)},
        {"window_size": (8, 0), "cp_comm_type": "a2a+p2p"},
        {"window_size": (8, 0), "cp_comm_type": ["a2a", "a2a", "p2p", "a2a"]},
    ]
}
"""Sentence -> fields of a configuration under context parallelism that meet it."""


@pytest.mark.parametrize("sentence", WITH_TRANSFORMER_ENGINE)
def test_what_transformer_engine_cannot_cut_is_refused_with_a_sentence(sentence):
    for fields in WITH_TRANSFORMER_ENGINE[sentence]:
        config = dataclasses.replace(configured(DENSE, CP2), **fields)
        refuse_known_faults(config, transformer_engine=False)  # our attention can
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            refuse_known_faults(config, transformer_engine=True)
        refuse_known_faults(dataclasses.replace(config, cp_comm_type="a2a"), transformer_engine=True)
        refuse_known_faults(dataclasses.replace(config, context_parallel_size=1), transformer_engine=True)


def test_experts_with_biases_are_not_cut_over_tensor_parallel_ranks():
    with pytest.raises(ConfigError, match=r"Megatron Core refuses this model: .*ETP==1"):
        configured(MOE, TP2_SP, add_bias_linear=True)
    configured(MOE, {**TP2_SP, "expert_tensor_parallel_size": 1}, add_bias_linear=True)
    configured(MOE, {**TP2_SP, "expert_model_parallel_size": 2})


def test_a_providers_fused_activation_may_not_leave_out_the_clamp():
    config = configured()
    config.bias_activation_fusion, config.activation_func_clamp_value = True, 7.0
    with pytest.raises(ConfigError, match="bias_activation_fusion: the fused kernel ignores"):
        refuse_known_faults(config, transformer_engine=False)


def test_every_sentence_of_refuse_known_faults_is_met_above():
    rare = configured(DENSE, {}, window_size=[8, 0])
    messages = [message for _, message in known_faults(rare, transformer_engine=False)]
    tables = REFUSED, WITH_TRANSFORMER_ENGINE
    sentences = [re.sub(r"window_(size|attn_skip_freq)=[^:]*", "", sentence) for table in tables for sentence in table]
    assert len(messages) == len(sentences) + 7, "test_architecture_fp8.py has four, test_flash_sinks.py three"
    assert all(any(start in message for message in messages) for start in sentences)


def test_what_is_right_is_not_refused():
    configured(DENSE, PP2_VPP2, overlap_p2p_comm=True)
    configured(DENSE, {}, multi_latent_attention=True)
    configured(MOE, **Z_LOSS)
    configured(MOE, {"pipeline_model_parallel_size": 2}, **Z_LOSS)


def test_a_transformer_field_that_megatron_does_not_have_is_named():
    with pytest.raises(ConfigError, match="unexpected keyword argument 'moe_shared_expert_size'"):
        configured(moe_shared_expert_size=3)


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("context_parallel_size", 2, "parallel.context_parallel_size"),
        ("sequence_parallel", True, "parallel.sequence_parallel"),
        ("bf16", True, "optimizer.precision"),
        ("params_dtype", "bfloat16", "optimizer.precision"),
    ],
)
def test_a_transformer_field_that_would_contradict_another_section_is_refused(field, value, key):
    with pytest.raises(ConfigError, match=f"is not allowed: set {key}"):
        configured(**{field: value})


def test_yarn_that_megatron_cannot_build_is_refused():
    with pytest.raises(ConfigError, match="latent attention has its own YaRN"):
        configured(YARN, {}, multi_latent_attention=True)
    odd = dataclasses.replace(YARN, yarn=YarnConfig(original_max_position_embeddings=34))
    configured(odd)
    with pytest.raises(ConfigError, match=r"must be a multiple of 4, twice parallel\.context_parallel_size"):
        configured(odd, CP2)


class FusedLinear:
    """Stands for Transformer Engine's linear layer, which normalises its input."""

    def __init__(self, *sizes: int, config: TransformerConfig) -> None:
        self.sizes, self.eps = sizes, config.layernorm_epsilon


@pytest.mark.parametrize("epsilon", [1e-6, None])
def test_on_transformer_engines_spec_the_linear_layers_after_the_latents_have_their_epsilon(monkeypatch, epsilon):
    names = "linear_q_down_proj linear_q_up_proj linear_kv_up_proj linear_proj".split()
    attention = SimpleNamespace(submodules=SimpleNamespace(**dict.fromkeys(names, FusedLinear)))
    block = SimpleNamespace(
        layer_specs=[SimpleNamespace(submodules=SimpleNamespace(self_attention=attention, mlp=None))]
    )
    monkeypatch.setattr(architecture, "get_gpt_decoder_block_spec", lambda *_, **__: block)
    config = configured(dataclasses.replace(DENSE, latent_layernorm_epsilon=epsilon), {}, multi_latent_attention=True)
    assert layer_spec(config, transformer_engine=True) is block
    linears = {name: getattr(attention.submodules, name)(3, 4, config=config) for name in names}
    of_latents = {name: linear.eps for name, linear in linears.items() if "_up_" in name}
    assert of_latents == dict.fromkeys(["linear_q_up_proj", "linear_kv_up_proj"], epsilon or 1e-5)
    assert all(linears[name].eps == 1e-5 for name in linears.keys() - of_latents.keys())
    assert config.layernorm_epsilon == 1e-5 and linears["linear_q_up_proj"].sizes == (3, 4)


def test_what_megatron_itself_refuses_is_one_sentence():
    with pytest.raises(ConfigError, match="Megatron Core refuses this model: ") as caught:
        configured(recompute_granularity="full")
    assert "\n" not in str(caught.value) and "recompute" in str(caught.value)


def test_a_transformer_field_has_the_last_word():
    assert configured(attention_softmax_in_fp32=False).attention_softmax_in_fp32 is False
    assert configured(layernorm_zero_centered_gamma=True).layernorm_zero_centered_gamma is True
    assert configured(layernorm_epsilon=0.5).layernorm_epsilon == 0.5


def test_router_losses_are_off_unless_asked_for():
    assert configured(MOE).moe_router_load_balancing_type == "none"
    balanced = configured(MOE, moe_aux_loss_coeff=0.01)
    assert (balanced.moe_router_load_balancing_type, balanced.moe_aux_loss_coeff) == ("aux_loss", 0.01)


@pytest.mark.parametrize(
    ("rows", "divisible_by", "tp_size", "padded"),
    [(61, 8, 1, 64), (61, 8, 4, 64), (65, 8, 4, 96), (128, 128, 1, 128), (129, 128, 2, 256), (1, 128, 4, 512)],
)
def test_the_vocabulary_is_padded_to_a_multiple(rows, divisible_by, tp_size, padded):
    assert padded_vocab_size(rows, divisible_by, tp_size) == padded


def built(option: str, changes: dict) -> dict:
    """On one rank: facts of the shipped model ``option``, narrowed by ``changes`` to what a test can hold."""
    config = load([f"model={option}", "optimizer=fp32"])
    model = dataclasses.replace(config.model, **changes)
    grid = initialize(config.parallel, seed=1)
    transformer = transformer_config(model, config.parallel, config.optimizer, config.schedule)
    (chunk,) = build_chunks(model, transformer, grid, model.vocab_size)
    gpt = unwrapped(chunk)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = gpt(tokens, tokens, None)
    return {
        "finite": bool(logits.isfinite().all()),
        "rows": logits.size(-1),
        "tied": gpt.share_embeddings_and_output_weights,
        "q_layernorm": any("q_layernorm.weight" in name for name, _ in gpt.named_parameters()),
        "inv_freq": None if transformer.multi_latent_attention else gpt.rotary_pos_emb.inv_freq.double(),
        "num_layers": len(gpt.decoder.layers),
    }


@combinations(option=SHIPPED_MODELS, quick={"option": ["tiny", "llama31_405b", "deepseek_v3"]}, strength=1)
def test_every_shipped_architecture_is_accepted_and_builds_when_narrowed(ranks, option):
    config = load([f"model={option}"])
    full = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    assert full.num_layers == config.model.num_layers and full.hidden_size == config.model.hidden_size
    narrow = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 100,
    }
    if config.model.num_moe_experts is not None:
        narrow |= {"num_moe_experts": 16, "moe_ffn_hidden_size": 64}
    if "moe_layer_freq" in config.model.transformer:
        narrow["transformer"] = {**config.model.transformer, "moe_layer_freq": [0, 1]}
    (facts,) = ranks.run(built, option, narrow, world_size=1)
    rows = padded_vocab_size(100, config.model.make_vocab_size_divisible_by, 1)
    assert facts["finite"] and (facts["rows"], facts["num_layers"]) == (rows, 2)
    assert facts["tied"] is config.model.share_embeddings_and_output_weights
    assert facts["q_layernorm"] is config.model.qk_layernorm
    if facts["inv_freq"] is None:  # latent attention rotates by itself
        return
    channels = int((config.model.kv_channels or 32 // 4) * config.model.rotary_percent)
    inv_freq = config.model.rotary_base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    assert facts["inv_freq"][0] == pytest.approx(inv_freq[0].item())
    slowest = inv_freq[-1].item() / (config.model.rope_scaling_factor or 1)
    assert facts["inv_freq"][-1] == pytest.approx(slowest, rel=1e-5)


def specs(moe: bool) -> dict:
    grid_of = ParallelConfig()
    initialize(grid_of, seed=1)
    model = dataclasses.replace(MOE if moe else DENSE, qk_layernorm=True)
    block = layer_spec(transformer_config(model, grid_of, OptimizerConfig(precision="fp32"), ScheduleConfig()))
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    norms = [block.layer_norm, layer.input_layernorm, layer.pre_mlp_layernorm]
    norms += [attention.q_layernorm, attention.k_layernorm]
    return {
        "norms": [norm is RMSNorm for norm in norms],
        "core_attention": attention.core_attention is CoreAttention,
        "map": layer.sharded_state_dict_keys_map,
    }


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_local_spec_has_our_layers_and_transformer_engines_names(ranks, moe):
    (facts,) = ranks.run(specs, moe, world_size=1)
    assert all(facts["norms"]) and facts["core_attention"]
    fused = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not moe:
        fused["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    assert facts["map"] == fused


def test_transformer_engine_is_used_only_where_it_imports_and_cuda_is_there(monkeypatch):
    for on_cpu, imports in [(True, True), (True, False), (False, False), (False, True)]:
        monkeypatch.setattr(architecture, "cpu", SimpleNamespace(ON_CPU=on_cpu))
        monkeypatch.setattr(architecture.repairs, "have_transformer_engine", lambda imports=imports: imports)
        assert architecture.uses_transformer_engine() is (not on_cpu and imports)
