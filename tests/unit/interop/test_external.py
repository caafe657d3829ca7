# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""torch_dist checkpoints by other layer specs, by other versions of Megatron, and with their optimizer state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import checkpointed_run
import common_state
import layouts
import models
import pytest
import torch
from checkpointed_run import Setup
from held_state import held
from tiers import combinations

from megatron_selfdistill.checkpoint.formats.model_tensors import NOT_WEIGHTS
from megatron_selfdistill.checkpoint.formats.saved_run import SECTION
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.checkpoint.state import _keep_own_rates
from megatron_selfdistill.config import OptimizerConfig, OptimizerConstants, ParallelConfig
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop import torch_dist_tensors
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.interop.hf.mapping import family_of_model
from megatron_selfdistill.interop.torch_dist_tensors import Piece, TorchDistReader

TP2, PP2 = models.parallel(tp=2), models.parallel(pp=2)


LATENT = {"multi_latent_attention": True, "q_lora_rank": 12, "kv_lora_rank": 20, "qk_head_dim": 12, "rope_type": "rope"}
LATENT |= {"qk_pos_emb_head_dim": 8, "v_head_dim": 14}
KINDS = {
    **{kind: models.model_config(kind) for kind in ("gqa", "moe", "gated_delta")},
    "latent": models.model_config("gqa", qk_layernorm=True, transformer=LATENT),
}


def save_each(directory: Path) -> None:
    for name, model in KINDS.items():
        kind = "gqa" if name == "latent" else name
        changes = {"qk_layernorm": model.qk_layernorm, "transformer": model.transformer}
        checkpointed_run.start(Setup(kind=kind, teacher="current", model_changes=changes), directory / name).save(1)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> dict[str, Path]:
    """Return a checkpoint of each of `KINDS` with this program's names, saved by one rank."""
    directory = tmp_path_factory.mktemp("runs")
    ranks.run(save_each, directory, world_size=1)
    return {kind: directory / kind / "checkpoints" / "iter_0000001" for kind in KINDS}


SPECS = [
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
]
"""The names of each norm in Megatron's own local spec, and in Transformer Engine's, which fuses the norm."""


def by_the_other_spec(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name each norm as the spec does that this program's name is not from."""
    for local, fused in SPECS:
        if f".{fused}" in key:
            return {key.replace(f".{fused}", f".{local}"): tensor}
    for local, fused in SPECS:
        if f".{local}" in key:
            return {key.replace(f".{local}", f".{fused}"): tensor}
    return {key: tensor}


def by_stock_local_layers(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Megatron's own local spec calls every norm before an MLP a part of ``linear_fc1``, experts or not."""
    return {key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): tensor}


def with_numbered_layers(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Newer versions give each layer a key of its own."""
    if not key.startswith("decoder.layers."):
        return {key: tensor}
    rest = key.removeprefix("decoder.layers.")
    return {f"decoder.layers.{layer}.{rest}": part for layer, part in enumerate(tensor)}


def with_more(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Multi-token-prediction layers, the writer's optimizer."""
    if key != "decoder.final_layernorm.weight":
        return {key: tensor}
    return {key: tensor, "mtp.layers.eh_proj.weight": tensor[None], "optimizer.state.exp_avg.x": tensor}


def rewritten(path: Path, out: Path, rename: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Path:
    """Save the weights of ``path`` under other names, as another program does, with one tensor in each piece."""
    source = TorchDistReader(path)
    tensors: dict[str, torch.Tensor] = {}
    for key in source.shapes:
        if not key.startswith(NOT_WEIGHTS):
            tensors |= rename(key, source.read_at((key, ()), ()))
    pieces = [Piece(k, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), t.dtype, t.clone) for k, t in tensors.items()]
    target = out / "iter_0000001"
    torch_dist_tensors.write(target, pieces, {key: value for key, value in source.common.items() if key != SECTION})
    for part in target.glob("manifest*"):
        part.unlink()
    return target


def load_each(cuts: ParallelConfig, cases: list[tuple[str, Path]]) -> list[dict]:
    """Return the weights of checkpoints of these kinds on this rank."""
    from megatron_selfdistill.checkpoint.external import load_weights

    found = []
    for kind, path in cases:
        parallel = dataclasses.replace(cuts, sequence_parallel=True) if kind == "moe" and cuts == TP2 else cuts
        chunks, _ = models.build(KINDS[kind], parallel, seed=9)
        load_weights(path, chunks, models.VOCAB_SIZE)
        found.append(layouts.shards(chunks, lambda p: p.detach().clone()))
    return found


CASES = {
    "TP2": (
        TP2,
        [
            *(("gqa", by_stock_local_layers), ("gqa", by_the_other_spec), ("moe", by_stock_local_layers)),
            *(("moe", with_numbered_layers), ("gated_delta", by_the_other_spec)),
        ],
    ),
    "PP2, numbered layers": (PP2, [("gqa", with_numbered_layers)]),
    "PP2": (PP2, [("moe", by_the_other_spec), ("moe", with_more), ("latent", by_the_other_spec)]),
}
"""Name -> a layout, and kinds of models with how another program names their tensors."""


@combinations(case=CASES, quick={"case": ["PP2, numbered layers"]}, strength=1)
def test_names_of_other_layers_and_versions_are_understood(ranks, saved, tmp_path, case):
    layout, named = case
    cases = [(kind, rewritten(saved[kind], tmp_path / f"{n}", rename)) for n, (kind, rename) in enumerate(named)]
    (whole,) = ranks.run(load_each, models.parallel(), [(kind, saved[kind]) for kind, _ in cases], world_size=1)
    loaded = ranks.run(load_each, layout, cases, world_size=2)
    for one, expected, *shards in zip(named, whole, *loaded, strict=True):
        assert layouts.worst_difference(layouts.join(shards), layouts.join([expected]))[0] == 0, one


@pytest.mark.parametrize("rename", [by_stock_local_layers, by_the_other_spec, with_numbered_layers])
@pytest.mark.parametrize("kind", ["gqa", "moe"])
def test_names_of_other_layers_are_converted(saved, tmp_path, kind, rename):
    weights = open_weights(rewritten(saved[kind], tmp_path, rename))
    model = architecture_from_args(weights.args)
    rules = family_of_model(model).rules(model)
    weights.check_shapes(rules)
    whole = open_weights(saved[kind])
    assert all(torch.equal(weights.read(rule), whole.read(rule)) for rule in rules)


# With the optimizer's state


def go_on_as_another_run(setup: Setup, run_dir: Path, out: Path) -> dict:
    """Other weights, other moments; those of the checkpoint on top of them; then steps 3 and 4."""
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer

    run = checkpointed_run.start(dataclasses.replace(setup, seed=5), out, steps=1)
    assert load_weights_and_optimizer(run_dir / "checkpoints", run.chunks, run.optimizer) == 2
    run.scheduler.num_steps = 2  # the schedule is this run's own: here it stands where the other one stood
    run.step(3)
    run.step(4)
    return run.parameters()


@combinations(distributed=[True, False], quick={"distributed": ["True"]}, strength=1)
def test_optimizer_state_is_taken_over_in_another_layout(ranks, tmp_path, distributed):
    optimizer = dataclasses.replace(checkpointed_run.ADAM, use_distributed_optimizer=distributed)
    setup = Setup(teacher="current", optimizer=optimizer, model_changes={"num_layers": 2})
    ended = ranks.run(checkpointed_run.save_and_go_on, setup.cut(pp=2), tmp_path, world_size=2)
    taken = ranks.run(go_on_as_another_run, setup.cut(tp=2), tmp_path, tmp_path / "other", world_size=2)
    expected = layouts.join([rank["parameters"] for rank in ended])
    assert layouts.worst_difference(layouts.join(taken), expected)[0] < 1e-6


def state_as_megatron_lm_cuts_it_by_default(run_dir: Path) -> None:
    """Save the optimizer as Megatron-LM does without flags, and take it over; one of 2 data-parallel ranks."""
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer
    from megatron_selfdistill.checkpoint.formats import torch_dist

    torch_dist.CONTENT["distrib_optim_sharding_type"] = "dp_reshardable"
    setup = Setup(teacher="current")
    run = checkpointed_run.start(setup, run_dir, steps=2)
    run.save(2)
    other = checkpointed_run.start(dataclasses.replace(setup, seed=5), run_dir / "other", steps=1)
    assert load_weights_and_optimizer(run_dir / "checkpoints", other.chunks, other.optimizer) == 2
    found, expected = held(other.chunks, other.optimizer), held(run.chunks, run.optimizer)
    assert set(found["adam_steps"]) == {2}
    for part in ("weights", "moments"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], value) for name, value in expected[part].items()), part


@pytest.mark.full
def test_optimizer_state_that_data_parallel_ranks_cut_is_taken_over(ranks, tmp_path):
    ranks.run(state_as_megatron_lm_cuts_it_by_default, tmp_path, world_size=2)


def refuse_optimizer(cases: list[tuple[Setup, Path]], out: Path) -> None:
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer

    for setup, path in cases:
        run = checkpointed_run.start(setup, out)
        with pytest.raises(CheckpointError, match=r"optimizer.* is missing"):
            load_weights_and_optimizer(path, run.chunks, run.optimizer)


def test_a_checkpoint_without_fitting_optimizer_state_is_refused(ranks, saved, tmp_path):
    setup = Setup(teacher="current")
    weights_alone = rewritten(saved["gqa"], tmp_path, lambda key, tensor: {key: tensor})
    common = common_state.read(weights_alone)
    del common["optimizer"]
    common_state.write(weights_alone, common)
    momentum = OptimizerConstants(sgd_momentum=0.9)
    sgd = OptimizerConfig(optimizer="sgd", precision="fp32", constants=momentum, use_distributed_optimizer=False)
    cases = [(setup, weights_alone), (dataclasses.replace(setup, optimizer=sgd), saved["gqa"])]
    ranks.run(refuse_optimizer, cases, tmp_path / "out", world_size=1)


@pytest.mark.parametrize("stored_rates", [{}, {"max_lr": 1e-3, "min_lr": 1e-4}], ids=["0.16", "0.19"])
def test_stored_groups_of_parameters_get_the_rates_of_this_run(stored_rates):
    common = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    kinds = [{"wd_mult": decay, **common} for decay in (1.0, 0.0)]
    rates = {"max_lr": 1e-2, "min_lr": 0.0}
    stored = {"param_groups": [kind | stored_rates | {"step": 5} for kind in reversed(kinds)]}
    _keep_own_rates([kind | rates | {"params": [index]} for index, kind in enumerate(kinds)], stored)
    assert stored["param_groups"] == [kind | rates | {"step": 5} for kind in reversed(kinds)]
