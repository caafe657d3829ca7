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
from megatron_selfdistill.checkpoint.state import _keep_own_rates
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, OptimizerConstants, ParallelConfig
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop import torch_dist_tensors
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.interop.torch_dist_tensors import Piece, TorchDistReader

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


def save(setup: Setup, run_dir: Path) -> None:
    checkpointed_run.start(setup, run_dir).save(1)


@pytest.fixture(scope="module", params=["gqa", "moe"])
def saved(request, ranks, tmp_path_factory) -> tuple[str, Path]:
    """Return the kind of a model, and a checkpoint of the model with this program's names, saved by one rank."""
    run_dir = tmp_path_factory.mktemp("run")
    ranks.run(save, Setup(kind=request.param, teacher="current"), run_dir, world_size=1)
    return request.param, run_dir / "checkpoints" / "iter_0000001"


def by_stock_local_layers(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Megatron's own local spec calls every norm before an MLP a part of ``linear_fc1``, experts or not."""
    return {key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): tensor}


def by_unfused_layers(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    key = key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return {key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): tensor}


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


def load(model: ModelConfig, parallel: ParallelConfig, path: Path) -> dict:
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(model, parallel, seed=9)
    load_weights(path, chunks, models.VOCAB_SIZE)
    return layouts.shards(chunks, lambda p: p.detach().clone())


@pytest.fixture(scope="module")
def expected(ranks, saved) -> dict:
    """Return the weights of `saved`, as one rank loads them."""
    kind, path = saved
    return layouts.join(ranks.run(load, models.model_config(kind), ParallelConfig(), path, world_size=1))


@combinations(
    rename={
        rename.__name__: rename
        for rename in (by_stock_local_layers, by_unfused_layers, with_numbered_layers, with_more)
    },
    parallel={"TP2": TP2, "PP2": PP2},
    strength=1,
)
def test_names_of_other_layers_and_versions_are_understood(ranks, saved, expected, tmp_path, rename, parallel):
    kind, path = saved
    other = rewritten(path, tmp_path, rename)
    if kind == "moe" and parallel is TP2:
        parallel = dataclasses.replace(TP2, sequence_parallel=True)
    loaded = ranks.run(load, models.model_config(kind), parallel, other, world_size=2)
    assert layouts.worst_difference(layouts.join(loaded), expected)[0] == 0


@pytest.mark.parametrize("rename", [by_stock_local_layers, by_unfused_layers, with_numbered_layers])
def test_names_of_other_layers_are_converted(saved, tmp_path, rename):
    from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    weights = open_weights(rewritten(saved[1], tmp_path, rename))
    model = architecture_from_args(weights.args)
    rules = family_of_model(model).rules(model)
    weights.check_shapes(rules)
    whole = open_weights(saved[1])
    assert all(torch.equal(weights.read(rule), whole.read(rule)) for rule in rules)


# With the optimizer's state

PLAIN_ADAM = dataclasses.replace(checkpointed_run.ADAM, use_distributed_optimizer=False)


def go_on_as_another_run(setup: Setup, run_dir: Path, out: Path) -> dict:
    """Other weights, other moments; those of the checkpoint on top of them; then steps 3 and 4."""
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer

    run = checkpointed_run.start(dataclasses.replace(setup, seed=5), out, steps=1)
    assert load_weights_and_optimizer(run_dir / "checkpoints", run.chunks, run.optimizer) == 2
    run.scheduler.num_steps = 2  # the schedule is this run's own: here it stands where the other one stood
    run.step(3)
    run.step(4)
    return run.parameters()


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(checkpointed_run.ADAM, id="distributed"),
        pytest.param(PLAIN_ADAM, id="plain", marks=pytest.mark.full),
    ],
)
def test_optimizer_state_is_taken_over_in_another_layout(ranks, tmp_path, optimizer):
    setup = Setup(teacher="current", optimizer=optimizer)
    ended = ranks.run(
        checkpointed_run.save_and_go_on, setup.cut(pipeline_model_parallel_size=2), tmp_path, world_size=2
    )
    taken = ranks.run(
        go_on_as_another_run, setup.cut(tensor_model_parallel_size=2), tmp_path, tmp_path / "other", world_size=2
    )
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


def test_optimizer_state_that_data_parallel_ranks_cut_is_taken_over(ranks, tmp_path):
    ranks.run(state_as_megatron_lm_cuts_it_by_default, tmp_path, world_size=2)


def refuse_optimizer(setup: Setup, path: Path, out: Path, message: str) -> None:
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer

    run = checkpointed_run.start(setup, out)
    with pytest.raises(CheckpointError, match=message):
        load_weights_and_optimizer(path, run.chunks, run.optimizer)


def test_a_checkpoint_without_fitting_optimizer_state_is_refused(ranks, saved, tmp_path):
    kind, path = saved
    setup = Setup(kind=kind, teacher="current")
    weights_alone = rewritten(path, tmp_path, lambda key, tensor: {key: tensor})
    common = common_state.read(weights_alone)
    del common["optimizer"]
    common_state.write(weights_alone, common)
    ranks.run(refuse_optimizer, setup, weights_alone, tmp_path / "a", "optimizer.* is missing", world_size=1)
    sgd = OptimizerConfig(
        optimizer="sgd",
        precision="fp32",
        constants=OptimizerConstants(sgd_momentum=0.9),
        use_distributed_optimizer=False,
    )
    other = dataclasses.replace(setup, optimizer=sgd)
    ranks.run(refuse_optimizer, other, path, tmp_path / "b", "optimizer.* is missing", world_size=1)


@pytest.mark.parametrize("stored_rates", [{}, {"max_lr": 1e-3, "min_lr": 1e-4}], ids=["0.16", "0.19"])
def test_stored_groups_of_parameters_get_the_rates_of_this_run(stored_rates):
    kinds = [
        {"wd_mult": decay, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
        for decay in (1.0, 0.0)
    ]
    own = [kind | {"max_lr": 1e-2, "min_lr": 0.0, "params": [index]} for index, kind in enumerate(kinds)]
    stored = {"param_groups": [kind | stored_rates | {"step": 5} for kind in reversed(kinds)]}
    _keep_own_rates(own, stored)
    assert stored["param_groups"] == [kind | {"max_lr": 1e-2, "min_lr": 0.0, "step": 5} for kind in reversed(kinds)]
