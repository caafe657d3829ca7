# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron Core gets the architecture of the configuration; combinations that it computes wrongly are refused."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from models import parallel
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

DENSE = ModelConfig(num_layers=4)
MOE = ModelConfig(num_layers=4, num_moe_experts=4)
SHIPPED_MODELS = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def configured(model: ModelConfig = DENSE, cuts: ParallelConfig | None = None, **transformer) -> TransformerConfig:
    model, optimizer = dataclasses.replace(model, transformer=transformer), OptimizerConfig(precision="fp32")
    return transformer_config(model, cuts or parallel(), optimizer, ScheduleConfig())


PP2_VPP2, TP2, TP2_SP, CP2 = parallel(pp=2, vpp=2), parallel(tp=2), parallel(tp=2, sp=True), parallel(cp=2)
TWO_GROUPS = dataclasses.replace(DENSE, num_attention_heads=4, num_query_groups=2)
GELU = dataclasses.replace(DENSE, activation="gelu", gated_linear_unit=False)
GATED_DELTA = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2}
LATENT, Z_LOSS = {"multi_latent_attention": True}, {"moe_z_loss_coeff": 0.01}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01}
TWO_LOSSES = {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.01, 0.01]}
YARN = ModelConfig(num_layers=4, position_embedding_type="yarn", yarn=YarnConfig(rotary_scaling_factor=4.0))
ALL_HEADS = dataclasses.replace(DENSE, qk_layernorm_all_heads=True)
SINCE_0_18 = older_megatron.version() >= (0, 18)
FUSER = {"use_transformer_engine_op_fuser": True}
RANK_CAPACITY = FUSER | {"moe_expert_rank_capacity_factor": 1.0, "moe_flex_dispatcher_backend": "hybridep"}
DEFERRED = {"defer_embedding_wgrad_compute": True, "gradient_accumulation_fusion": True}
# the beginning of a sentence -> ways of meeting it: (model, layout, model.transformer)
REFUSED: dict[str, list[tuple[ModelConfig, ParallelConfig | None, dict]]] = {
    "interleaved pipelining over 2 stages with batch_p2p_comm": [(DENSE, PP2_VPP2, {"batch_p2p_comm": True})],
    "on gloo, overlap_p2p_comm sends buffers": [
        (DENSE, PP2_VPP2, {"overlap_p2p_comm": True, "deallocate_pipeline_outputs": True})
    ],
    "multi-latent attention without Transformer Engine": [(DENSE, TP2, LATENT)],
    "latent attention ignores no_rope_freq": [(DENSE, None, LATENT | {"no_rope_freq": [1, 0, 0, 0]})],
    "qk_layernorm_all_heads is an RMSNorm of ordinary attention": [
        *((ALL_HEADS, None, LATENT), (dataclasses.replace(ALL_HEADS, normalization="LayerNorm"), None, {}))
    ],
    "tensor-parallel ranks are copied": [(dataclasses.replace(ALL_HEADS, num_query_groups=1), TP2, {})],
    "calculate_per_token_loss multiplies router losses": [(DENSE, None, {"calculate_per_token_loss": True})],
    "defer_embedding_wgrad_compute keeps the gradients": [(DENSE, parallel(pp=2), DEFERRED)],
    "tp_comm_overlap needs microbatches of one length": [(DENSE, TP2_SP, {"tp_comm_overlap": True})],
    "multi-token-prediction layers are not trained": [(DENSE, None, {"mtp_num_layers": 1})],
    "expected [left, 0], where left is the number of tokens before": [
        (DENSE, None, {"window_size": window}) for window in ([8, 8], [-1, 0], [8])
    ],
    "window_attn_skip_freq=0: expected at least 1": [
        (DENSE, None, {"window_size": [8, 0], "window_attn_skip_freq": 0})
    ],
    "window_attn_skip_freq=[1, 0, 1]: expected one entry for each": [
        (DENSE, None, {"window_size": [8, 0], "window_attn_skip_freq": [1, 0, 1]})
    ],
    "apply_rope_fusion rotates packed sequences as if": [
        (DENSE, None, {"apply_rope_fusion": True, "rotary_interleaved": True})
    ],
    "apply_rope_fusion drops YaRN's factor of queries and keys": [(YARN, None, {"apply_rope_fusion": True})],
    "the fused kernel ignores activation_func_clamp_value": [
        (DENSE, None, {"bias_activation_fusion": True, "activation_func_clamp_value": 7.0})
    ],
    "perform_initialization=false leaves weights unmarked": [(DENSE, TP2, {"perform_initialization": False})][
        SINCE_0_18:
    ],
    "dropout makes the trained student differ": [
        (DENSE, None, {name: 0.1}) for name in ("hidden_dropout", "attention_dropout")
    ],
    "moe_expert_capacity_factor drops tokens": [
        *((MOE, None, {"moe_expert_capacity_factor": 1.0}), *[(MOE, None, RANK_CAPACITY)] * SINCE_0_18)
    ],
    "mlp_chunks_for_training routes padding": [(MOE, None, {"mlp_chunks_for_training": 2})] * SINCE_0_18,
    "use_transformer_engine_op_fuser ignores": [
        (DENSE, None, FUSER | ignored) for ignored in ({"activation_func_clamp_value": 7.0}, {"glu_linear_offset": 1.0})
    ][: 2 * SINCE_0_18],
    "moe_router_load_balancing_type=global_aux_loss has a gradient that shrinks": [
        *((MOE, None, GLOBAL), (MOE, None, TWO_LOSSES))
    ],
    "experimental_attention_variant has layers here for gated_delta_net only": [
        (DENSE, None, LATENT | {"experimental_attention_variant": "dsa"})
    ],
    "a gated delta net computes with silu": [(GELU, None, GATED_DELTA)],
    "Gated delta net does not support context parallel": [(DENSE, CP2, GATED_DELTA)],
    "attention_output_gate needs whole query groups": [(TWO_GROUPS, parallel(tp=4), {"attention_output_gate": True})],
    "moe_z_loss_coeff averages over each rank's own real tokens": [(MOE, CP2, Z_LOSS), (MOE, TP2_SP, Z_LOSS)],
}
BETWEEN_RANKS = "has no sliding window for cp_comm_type=p2p"


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_megatron_gets_wrong_is_refused_with_a_sentence(sentence, monkeypatch):
    monkeypatch.setattr(megatron_config, "is_te_min_version", lambda *_: True)  # Megatron's own checks come first
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for model, cuts, transformer in REFUSED[sentence]:
        with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
            configured(model, cuts, **transformer)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("communication", ["p2p", "a2a+p2p", ["a2a", "a2a", "p2p", "a2a"]])
def test_what_transformer_engine_cannot_cut_is_refused_with_a_sentence(communication):
    config = dataclasses.replace(configured(DENSE, CP2), window_size=(8, 0), cp_comm_type=communication)
    refuse_known_faults(config, transformer_engine=False)  # our attention can
    with pytest.raises(ConfigError, match=BETWEEN_RANKS):
        refuse_known_faults(config, transformer_engine=True)
    for change in ({"cp_comm_type": "a2a"}, {"context_parallel_size": 1}):
        refuse_known_faults(dataclasses.replace(config, **change), transformer_engine=True)


def test_experts_with_biases_are_not_cut_over_tensor_parallel_ranks():
    with pytest.raises(ConfigError, match=r"Megatron Core refuses this model: .*ETP==1"):
        configured(MOE, TP2_SP, add_bias_linear=True)
    configured(MOE, parallel(tp=2, sp=True, etp=1), add_bias_linear=True)
    configured(MOE, parallel(tp=2, sp=True, ep=2))


def test_every_sentence_of_refuse_known_faults_is_met_above():
    messages = [m for _, m in known_faults(configured(DENSE, window_size=[8, 0]), transformer_engine=False)]
    sentences = [re.sub(r"window_(size|attn_skip_freq)=[^:]*", "", sentence) for sentence in (*REFUSED, BETWEEN_RANKS)]
    assert len(messages) == len(sentences) + 7, "test_architecture_fp8.py has four, test_flash_sinks.py three"
    assert all(any(start in message for message in messages) for start in sentences)


def test_what_is_right_is_not_refused():
    configured(DENSE, PP2_VPP2, overlap_p2p_comm=True)
    configured(DENSE, **LATENT)
    for cuts in (parallel(), parallel(pp=2)):
        configured(MOE, cuts, **Z_LOSS)


NOT_ALLOWED = {
    "moe_shared_expert_size": (3, "unexpected keyword argument 'moe_shared_expert_size'"),
    "context_parallel_size": (2, "set parallel.context_parallel_size"),
    "sequence_parallel": (True, "set parallel.sequence_parallel"),
    "bf16": (True, "set optimizer.precision"),
    "params_dtype": ("bfloat16", "set optimizer.precision"),
    "recompute_granularity": ("full", "Megatron Core refuses this model: .*recompute"),
}
"""Fields of model.transformer -> a value, and what its refusal names."""


@pytest.mark.parametrize("field", NOT_ALLOWED)
def test_a_transformer_field_that_megatron_or_another_section_contradicts_is_refused(field):
    value, named = NOT_ALLOWED[field]
    with pytest.raises(ConfigError, match=named) as caught:
        configured(**{field: value})
    assert "\n" not in str(caught.value)


def test_yarn_that_megatron_cannot_build_is_refused():
    with pytest.raises(ConfigError, match="latent attention has its own YaRN"):
        configured(YARN, **LATENT)
    odd = dataclasses.replace(YARN, yarn=YarnConfig(original_max_position_embeddings=34))
    configured(odd)
    with pytest.raises(ConfigError, match=r"must be a multiple of 4"):
        configured(odd, CP2)


class FusedLinear:
    """Stands for Transformer Engine's linear layer, which normalises its input."""

    def __init__(self, *sizes: int, config: TransformerConfig) -> None:
        self.sizes, self.eps = sizes, config.layernorm_epsilon


@pytest.mark.parametrize("epsilon", [1e-6, None])
def test_on_transformer_engines_spec_the_linear_layers_after_the_latents_have_their_epsilon(monkeypatch, epsilon):
    names = "linear_q_down_proj linear_q_up_proj linear_kv_up_proj linear_proj".split()
    attention = SimpleNamespace(submodules=SimpleNamespace(**dict.fromkeys(names, FusedLinear)))
    layer = SimpleNamespace(submodules=SimpleNamespace(self_attention=attention, mlp=None))
    block = SimpleNamespace(layer_specs=[layer])
    monkeypatch.setattr(architecture, "get_gpt_decoder_block_spec", lambda *_, **__: block)
    config = configured(dataclasses.replace(DENSE, latent_layernorm_epsilon=epsilon), **LATENT)
    assert layer_spec(config, transformer_engine=True) is block
    linears = {name: getattr(attention.submodules, name)(3, 4, config=config) for name in names}
    expected = {name: (epsilon or 1e-5) if "_up_" in name else 1e-5 for name in names}
    assert {name: linear.eps for name, linear in linears.items()} == expected
    assert config.layernorm_epsilon == 1e-5 and linears["linear_q_up_proj"].sizes == (3, 4)


def test_router_losses_are_off_unless_asked_for():
    assert configured(MOE).moe_router_load_balancing_type == "none"
    balanced = configured(MOE, moe_aux_loss_coeff=0.01)
    assert (balanced.moe_router_load_balancing_type, balanced.moe_aux_loss_coeff) == ("aux_loss", 0.01)


def built(option: str, changes: dict) -> tuple[bool, int, int]:
    """Return whether a shipped model with ``changes`` has finite logits, the columns of the logits, and the layers."""
    config = load([f"model={option}", "optimizer=fp32"])
    model = dataclasses.replace(config.model, **changes)
    grid = initialize(config.parallel, seed=1)
    transformer = transformer_config(model, config.parallel, config.optimizer, config.schedule)
    gpt = unwrapped(build_chunks(model, transformer, grid, model.vocab_size)[0])
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = gpt(tokens, tokens, None)
    return bool(logits.isfinite().all()), logits.size(-1), len(gpt.decoder.layers)


@combinations(option=SHIPPED_MODELS, quick={"option": ["llama31_405b", "deepseek_v3"]}, strength=1)
def test_every_shipped_architecture_is_accepted_and_builds_when_narrowed(ranks, option):
    config = load([f"model={option}"])
    full = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    assert full.num_layers == config.model.num_layers and full.hidden_size == config.model.hidden_size
    narrow = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    narrow |= {"num_query_groups": 2, "vocab_size": 100}
    if config.model.num_moe_experts is not None:
        narrow |= {"num_moe_experts": 16, "moe_ffn_hidden_size": 64}
    if "moe_layer_freq" in config.model.transformer:
        narrow["transformer"] = {**config.model.transformer, "moe_layer_freq": [0, 1]}
    (facts,) = ranks.run(built, option, narrow, world_size=1)
    rows = padded_vocab_size(100, config.model.make_vocab_size_divisible_by, 1)
    assert facts == (True, rows, 2)
