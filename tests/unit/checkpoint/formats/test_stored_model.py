# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A checkpoint states its model, and a configuration that contradicts it is refused with both values."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import checkpointed_run
import common_state
import models
import pytest
from checkpointed_run import Setup

from megatron_selfdistill import config as configuration
from megatron_selfdistill.checkpoint.formats.stored_model import (
    _NOT_BUILT,
    architecture_from_args,
    reconcile,
    stored_vocab_size,
    with_stored_architecture,
)
from megatron_selfdistill.config import CheckpointConfig, Config, ModelConfig, YarnConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.model.model_values import differences

LLAMA = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32}
LLAMA |= {"num_query_groups": 8, "group_query_attention": True, "kv_channels": 128, "max_position_embeddings": 8192}
LLAMA |= {"position_embedding_type": "rope", "rotary_base": 500000, "normalization": "RMSNorm", "swiglu": True}
LLAMA |= {"add_bias_linear": False, "untie_embeddings_and_output_weights": True, "padded_vocab_size": 128256}
LLAMA |= {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 8}


def args(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**LLAMA, **changes})


# The architecture


SINCE_0_18 = {"null_tokenizer_eod_id": None}
"""An argument that every checkpoint of Megatron-LM has since 0.18."""
LATENT = {"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 64, "rope_type": "rope"}
YARN_0_19 = {**SINCE_0_18, "rotary_scaling_factor": 4.0, "mscale": 0.5, "mscale_all_dim": 0.0, "yarn_beta_fast": None}


@pytest.mark.parametrize(
    "stored, name, value",
    [
        ({"norm_epsilon": 3e-6}, "layernorm_epsilon", 3e-6),  # before it was renamed
        ({"layernorm_epsilon": 1e-6, "norm_epsilon": 1e-5}, "layernorm_epsilon", 1e-6),
        ({"use_rope_scaling": True}, "rope_scaling_factor", 8.0),
        ({"use_rope_scaling": False, "rope_scaling_factor": 8.0}, "rope_scaling_factor", None),
        ({"yarn_mscale": 0.5, "yarn_beta_fast": 2.0}, "yarn", YarnConfig(mscale=0.5, beta_fast=2.0)),
        ({**YARN_0_19, "position_embedding_type": "yarn"}, "yarn", YarnConfig(rotary_scaling_factor=4.0, mscale=0.5)),
        (YARN_0_19, "yarn", YarnConfig()),  # the scale of multi-latent attention
        ({**SINCE_0_18, "rotary_seq_len_interpolation_factor": 4}, "seq_len_interpolation_factor", 4),
        ({"rotary_seq_len_interpolation_factor": 4}, "seq_len_interpolation_factor", None),  # its models ignored it
        ({"group_query_attention": False, "num_query_groups": 1}, "num_query_groups", 32),
        ({"swiglu": False, "bias_gelu_fusion": False}, "activation", "gelu"),
        ({"swiglu": False, "bias_gelu_fusion": True, "add_bias_linear": True}, "activation", "gelu_tanh"),
        ({"position_embedding_type": None, "use_rotary_position_embeddings": True}, "position_embedding_type", "rope"),
        ({"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 1024}, "num_moe_experts", 8),
        ({"apply_layernorm_1p": True}, "transformer", {"layernorm_zero_centered_gamma": True}),
        (LATENT, "transformer", LATENT),
    ],
)
def test_what_megatron_lm_stores_is_understood(stored, name, value):
    assert getattr(architecture_from_args(args(**stored)), name) == value


NOT_BUILT = [
    ({"experimental_attention_variant": "gated_delta_net"}, "gated delta nets"),
    *(({name: 1}, f"{name}=1") for name in _NOT_BUILT),
    ({"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
    ({"num_experts": 8, "moe_router_load_balancing_type": ["quantile_balancing"]}, "quantile_balancing"),
    ({"num_experts": 8, "moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function"),
    ({"num_layers": None}, "num_layers"),
    ({"position_embedding_type": "mrope"}, "position_embedding_type"),
]


def test_what_is_not_built_here_is_refused_by_its_name():
    for stored, named in NOT_BUILT:
        with pytest.raises(CheckpointError, match=named):
            architecture_from_args(args(**stored))


# The vocabulary


def test_the_null_tokenizer_has_a_token_more_than_it_says_until_megatron_lm_0_18():
    null = args(tokenizer_type="NullTokenizer", vocab_size=999, padded_vocab_size=1024)
    assert stored_vocab_size(null) == 1000
    assert stored_vocab_size(args(tokenizer_type="NullTokenizer", vocab_size=1000, **SINCE_0_18)) == 1000


# Together with a configuration


def save(setup: Setup, run_dir: Path) -> None:
    checkpointed_run.start(setup, run_dir, steps=1).save(1)


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    setup = Setup(kind="moe", teacher="current", model_changes={"layernorm_epsilon": 1e-6})
    ranks.run(save, setup, run_dir, world_size=1)
    return run_dir / "checkpoints"


def loaded(checkpoint: Path, *overrides: str) -> Config:
    overrides = (f"checkpoint.load={checkpoint}", "run_dir=/nowhere", *overrides)
    return with_stored_architecture(configuration.load(overrides), configuration.GivenKeys(overrides))


def test_the_checkpoint_gives_the_architecture_and_what_is_set_again_or_is_no_architecture_is_kept(checkpoint):
    model = loaded(checkpoint).model
    assert differences(model, models.model_config("moe", layernorm_epsilon=1e-6)) == {}
    assert model.vocab_size == models.VOCAB_SIZE and model.make_vocab_size_divisible_by == 8
    again = ["model.num_layers=2", "model.layernorm_epsilon=1e-6"]
    free = ["model.transformer.moe_aux_loss_coeff=0.01", "+model.transformer.moe_permute_fusion=false"]
    model = loaded(checkpoint, *again, *free, "model.max_position_embeddings=64").model
    assert (model.transformer["moe_aux_loss_coeff"], model.max_position_embeddings) == (0.01, 64)
    assert model.transformer["moe_permute_fusion"] is False


CONTRADICTIONS = {
    "model.layernorm_epsilon=1e-5": "layernorm_epsilon is 1e-05, .*1e-06",
    "model.vocab_size=100": "vocab_size is 100, .*61",
    "model=tiny": "normalization is 'LayerNorm', .*'RMSNorm'",
    "+model.transformer.moe_router_pre_softmax=true": "transformer.moe_router_pre_softmax is True, .*False",
}


@pytest.mark.parametrize("override", CONTRADICTIONS)
def test_a_contradiction_shows_both_also_where_it_is_the_default(checkpoint, override):
    with pytest.raises(ConfigError, match=CONTRADICTIONS[override]):
        loaded(checkpoint, override)


def test_without_a_record_of_what_was_set_defaults_count_as_not_set(checkpoint):
    config = Config(run_dir="/nowhere", checkpoint=CheckpointConfig(load=str(checkpoint)))
    assert with_stored_architecture(config).model.num_moe_experts == 4
    with pytest.raises(ConfigError, match="num_layers is 3"):
        with_stored_architecture(dataclasses.replace(config, model=ModelConfig(num_layers=3)))


def test_a_checkpoint_without_arguments_leaves_the_configuration_alone(checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint / "iter_0000001", tmp_path / "iter_0000001"))
    common_state.write(path, {"iteration": 1})
    (path / "manifest.json").unlink()
    assert loaded(path, "model=tiny").model.normalization == "LayerNorm"


def test_a_rank_of_its_own_resumes_what_it_wrote(checkpoint):
    """The run directory's newest checkpoint says what the model is, not the one that it started from."""
    config = configuration.load([f"run_dir={checkpoint.parent}", "checkpoint.load=/gone"])
    assert with_stored_architecture(config).model.num_moe_experts == 4


def test_each_entry_of_yarn_that_was_given_is_compared_with_the_checkpoint():
    stored = ModelConfig(position_embedding_type="yarn", yarn=YarnConfig(mscale=0.5, beta_fast=2.0))
    given = ModelConfig(yarn=YarnConfig(mscale=0.5, beta_fast=3.0))
    assert reconcile(given, {"yarn.mscale"}, stored) == stored
    with pytest.raises(ConfigError, match=r"^model\.yarn\.beta_fast is 3\.0, .* 2\.0"):
        reconcile(given, {"yarn.mscale", "yarn.beta_fast"}, stored)
    with pytest.raises(ConfigError, match=r"^model\.yarn\.mscale is 1\.0, .* 0\.5"):
        reconcile(ModelConfig(), {"yarn.mscale"}, stored)
