# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Saving and loading: what lies on disk, other kinds of runs, and optimizers that have not stepped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import checkpointed_run
import layouts
import models
import pytest
import torch
from checkpointed_run import ADAM, Setup
from saved_checkpoints import raises, tensor_keys
from tiers import combinations

from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import OptimizerConstants

PLAIN = Setup(teacher="current", model_changes={"num_layers": 2})


# What lies on disk


def read_as_megatron(run_dir: Path) -> None:
    from megatron.core import dist_checkpointing

    checkpointed_run.start(Setup(kind="tied", teacher="ema"), run_dir, steps=1).save(7)
    path = run_dir / "checkpoints" / "iter_0000007"
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "7"
    common = dist_checkpointing.load_common_state_dict(str(path))  # torch.load(weights_only=True)
    assert (common["iteration"], common["checkpoint_version"]) == (7, 3.0)
    assert common["opt_param_scheduler"]["num_steps"] == 1
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    described = {"num_layers": 4, "num_query_groups": 2, "padded_vocab_size": 64, "params_dtype": torch.float32}
    described |= {"group_query_attention": True, "use_rotary_position_embeddings": True, "swiglu": True}
    described |= {"ckpt_format": "torch_dist", "untie_embeddings_and_output_weights": False, "add_bias_linear": False}
    assert {name: getattr(common["args"], name) for name in described} == described
    layer = "decoder.layers."
    model_keys = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    model_keys |= {f"{layer}mlp.{name}weight" for name in ("linear_fc1.layer_norm_", "linear_fc1.", "linear_fc2.")}
    attention = ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight")
    model_keys |= {f"{layer}self_attention.{name}" for name in attention}
    optimizer_keys = {f"optimizer.state.{s}.{k}" for s in ("param", "exp_avg", "exp_avg_sq") for k in model_keys}
    assert tensor_keys(path) == model_keys | optimizer_keys | {f"teacher.{k}" for k in model_keys}


def test_a_checkpoint_reads_as_one_of_megatron(ranks, tmp_path):
    ranks.run(read_as_megatron, tmp_path, world_size=1)


# Random states


def save_plain(setup: Setup, run_dir: Path) -> None:
    checkpointed_run.start(setup, run_dir).save(1)


RANDOM_STATES = {
    "TP 2": ({"tp": 2}, "0.0_1.2 0.1_1.2", "0.0.0_1.2.1 0.1.0_1.2.1"),
    "EP 2": ({"ep": 2}, "0.0_1.1", "0.0.0_1.1.2 0.0.1_1.1.2"),
}
"""Layout -> the shards on disk: those of Megatron-LM's ``get_rng_state``, by (pipeline, tensor), and this program's."""
SHARDS_WITH_EXPERTS = "0.0.0_1.1.2 0.0.1_1.1.2"  # by data-parallel rank too, before 0.17


@pytest.mark.parametrize("layout", RANDOM_STATES)
def test_random_states_are_stored_as_megatron_lm_reads_them_and_for_every_rank(ranks, tmp_path, layout):
    sizes, of_megatron, own = RANDOM_STATES[layout]
    if layout == "EP 2" and older_megatron.version() < (0, 17):
        of_megatron = SHARDS_WITH_EXPERTS
    setup = Setup(kind="moe" if layout == "EP 2" else "gqa", teacher="current").cut(**sizes)
    ranks.run(save_plain, setup, tmp_path, world_size=2)
    stored = load_metadata(tmp_path / "checkpoints" / "iter_0000001").state_dict_metadata
    for key, shards in (("rng_state", of_megatron), ("selfdistill_rng_state", own)):
        expected = [f"{key}/shard_{shard}" for shard in shards.split()]
        assert sorted(name for name in stored if name.startswith(key)) == expected


def load_with_another_kind(run_dir: Path) -> None:
    checkpointed_run.start(Setup(teacher="ema"), run_dir).save(1)
    with raises("teacher.weights=frozen"):
        checkpointed_run.start(Setup(teacher="frozen"), run_dir).load_latest()
    with raises("shape"):
        checkpointed_run.start(Setup(teacher="ema", model_changes={"num_layers": 2}), run_dir).load_latest()


def test_another_kind_of_run_is_refused(ranks, tmp_path):
    ranks.run(load_with_another_kind, tmp_path, world_size=1)


# Optimizers that have not stepped, or do not count steps


def save_before_the_first_step(setup: Setup, run_dir: Path) -> None:
    run = checkpointed_run.start(setup, run_dir)
    run.save(0)
    run.step(1)
    resumed = checkpointed_run.start(dataclasses.replace(setup, seed=6), run_dir)
    resumed.load_latest()
    resumed.step(1)
    fresh = checkpointed_run.start(setup, run_dir / "never saved", steps=1)
    for other in (resumed, fresh):
        worst = layouts.worst_difference(layouts.join([other.parameters()]), layouts.join([run.parameters()]))
        assert worst[0] == 0, worst


@combinations(optimizer=["adam", "plain adam", "sgd", "sgd with momentum"], precision=["fp32", "bf16"], strength=1)
def test_a_save_before_the_first_step_changes_nothing_and_resumes(ranks, tmp_path, optimizer, precision):
    constants = OptimizerConstants(sgd_momentum=0.9 if "momentum" in optimizer else 0.0)
    kind = {"optimizer": "adam" if "adam" in optimizer else "sgd", "use_distributed_optimizer": optimizer == "adam"}
    changed = dataclasses.replace(ADAM, precision=precision, constants=constants, **kind)
    ranks.run(save_before_the_first_step, dataclasses.replace(PLAIN, optimizer=changed), tmp_path, world_size=1)


def overlapped_weights_on_disk(run_dir: Path) -> tuple[dict, dict]:
    from megatron_selfdistill.checkpoint.external import load_weights

    overlapped = dataclasses.replace(ADAM, overlap_grad_reduce=True, overlap_param_gather=True)
    run = checkpointed_run.start(dataclasses.replace(PLAIN, optimizer=overlapped), run_dir, steps=1)
    path = run.save(1)
    fresh, _ = models.build(run.setup.model, run.setup.parallel, seed=2)
    assert load_weights(path, fresh) == 1
    return layouts.shards(fresh, lambda p: p.detach()), run.parameters()


@pytest.mark.full
def test_overlapped_parameters_are_gathered_before_they_are_saved(ranks, tmp_path):
    results = ranks.run(overlapped_weights_on_disk, tmp_path, world_size=2)
    on_disk, updated = (layouts.join([result[i] for result in results]) for i in (0, 1))
    assert layouts.worst_difference(on_disk, updated)[0] == 0
