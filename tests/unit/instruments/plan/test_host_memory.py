# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The host memory of a node against what the ranks of a run really hold in a save."""

from __future__ import annotations

import dataclasses

import checkpointed_run
import pytest
import torch
from checkpointed_run import ADAM, Setup
from models import model_config, planned

from megatron_selfdistill.config import load
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.host_memory import checkpoint_bytes

GIB = 2**30
BF16 = dataclasses.replace(ADAM, precision="bf16")


def bytes_in_a_save(setup: Setup, run_dir) -> int:
    """Bytes of optimizer state that a save puts into the host memory of this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from megatron_selfdistill.checkpoint import state
    from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT

    run = checkpointed_run.start(setup, run_dir, steps=1)
    model = state.model_state(run.chunks, CONTENT)
    saved = nested_values(state.optimizer_state(run.optimizer, model, CONTENT))
    return sum(one.data.nbytes for one in saved if isinstance(one, ShardedBase) and torch.is_tensor(one.data))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("gqa", {}, marks=pytest.mark.full),
        pytest.param("gqa", {"tensor_model_parallel_size": 2}, marks=pytest.mark.full),
        ("moe", {"expert_model_parallel_size": 2}),
    ],
)
def test_all_ranks_together_hold_what_is_planned_for_their_node(ranks, tmp_path, kind, sizes):
    from megatron_selfdistill.instruments.plan.host_memory import _saving

    setup = Setup(kind=kind, optimizer=BF16, teacher="current").cut(**sizes)
    (stage,) = planned(model_config(kind), setup.parallel, 4)
    config = dataclasses.replace(load(), optimizer=BF16, parallel=setup.parallel)
    expected = 4 * _saving(config, stage)["optimizer in a save"]
    held = sum(ranks.run(bytes_in_a_save, setup, tmp_path, world_size=4))
    assert held == pytest.approx(expected, rel=0.02)


def plan_of(*overrides: str) -> Plan:
    return dry_run(load(["recipe=qwen3_8b", *overrides]))


def host(*overrides: str) -> dict[str, float]:
    return plan_of(*overrides).host.parts


def test_the_offloaded_teacher_and_rows_that_exceed_their_store_are_held_all_the_time():
    offloaded = host("teacher.offload=cpu", "schedule.teacher_store_gb=0", "schedule.pair_order=teacher_first")
    assert offloaded["teacher"] == pytest.approx(8 * plan_of().stages[0].parameters * 2 / GIB)
    on_device = plan_of("schedule.pair_order=teacher_first").memory[0].training["teacher states"]
    assert offloaded["teacher states"] == pytest.approx(8 * on_device)
    average = host("teacher.offload=cpu", "teacher.weights=ema")
    assert average["teacher"] == pytest.approx(3 * offloaded["teacher"])
    assert average["teacher in a save"] > 0 == host()["teacher"]
    current = host("teacher.offload=cpu", "teacher.weights=current")
    assert current["reference"] == pytest.approx(offloaded["teacher"]) and current["teacher"] == 0
    assert offloaded["reference"] == 0, "a frozen teacher is the reference"


def test_a_checkpoint_holds_what_is_trained_and_frozen_weights_of_sleeping_engines_rest_in_host_memory():
    parameters = 8_190_735_360
    whole, adapted = plan_of(), plan_of("adapter.rank=8")
    assert checkpoint_bytes(whole.config, parameters) == 14 * parameters
    assert checkpoint_bytes(load(["recipe=qwen3_8b", "teacher.weights=ema"]), parameters) == 18 * parameters
    saves = [plan.host.parts["weights in a save"] for plan in (whole, adapted)]
    assert saves[1] < saves[0] / 100
    engines = 8 * parameters * 2 / GIB  # one on each GPU of the node
    assert whole.host.parts["engine weights"] == 0
    assert engines < adapted.host.parts["engine weights"] < 1.01 * engines
