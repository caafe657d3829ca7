# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The host memory of a node against what the ranks of a run really hold in a save."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import checkpointed_run
import pytest
import torch
from checkpointed_run import ADAM, Setup
from models import model_config, planned

from megatron_selfdistill.config import Config, ModelConfig, load
from megatron_selfdistill.instruments.plan import dry_run as dry_run_module
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.host_memory import checkpoint_bytes
from megatron_selfdistill.instruments.plan.plan_tables import summary

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
    for plan, trained in ((whole, parameters), (adapted, adapted.adapter_parameters)):
        assert f"a checkpoint takes {14 * trained / 1e9:.1f} GB" in summary(plan)
    saves = [plan.host.parts["weights in a save"] for plan in (whole, adapted)]
    assert saves[1] < saves[0] / 100
    engines = 8 * parameters * 2 / GIB  # one on each GPU of the node
    assert whole.host.parts["engine weights"] == 0
    assert engines < adapted.host.parts["engine weights"] < 1.01 * engines
    two_nodes = host("cluster.num_gpus=16")["optimizer in a save"]
    assert two_nodes == pytest.approx(whole.host.parts["optimizer in a save"] / 2), "more nodes share a save"


@pytest.fixture
def absent(monkeypatch) -> None:
    """Let the directories of teachers not be there, as on a machine that plans; `wide` ones are larger."""
    wide = load(["recipe=qwen3_32b"]).model

    def copies(config: Config) -> list[tuple[ModelConfig, dict[str, Path]]]:
        loads = {name: it.load for name, it in config.named_teachers.items() if it.load is not None}
        kinds = [{n: Path(at) for n, at in loads.items() if ("wide" in at) == large} for large in (False, True)]
        return [(model, places) for model, places in zip((config.model, wide), kinds, strict=True) if places]

    monkeypatch.setattr(dry_run_module, "require_teachers", lambda config: None)
    monkeypatch.setattr(dry_run_module, "teacher_copies", copies)


def test_named_teachers_share_one_copy_on_the_device_and_several_rest_in_host_memory(absent):
    math, code = "teachers.math.load=/math", "teachers.code.load=/code"
    plans = [plan_of(*names) for names in ((), (math,), (math, code))]
    none, one, two = (plan.memory[0].training for plan in plans)
    assert "named teachers" not in none
    assert one["named teachers"] == two["named teachers"] == none["teacher"] > 0, "as large as the start, the reference"
    rest = [plan.host.parts.get("named teachers", 0.0) for plan in plans]
    assert rest[:2] == [0, 0] and rest[2] == pytest.approx(2 * 8 * two["named teachers"])
    assert host(math, "teacher.offload=cpu")["named teachers"] == pytest.approx(rest[2] / 2)
    beside_student = plan_of(math, "target.anchor=student").memory[0].training
    assert beside_student["teacher"] == 0 < beside_student["named teachers"], "nothing reads the start"


# A teacher of the student's architecture, and two of 32 billion parameters.
SEVERAL = "teachers={math: {load: /m}, code: {load: /wide}, tools: {load: /wide2}}"


def test_the_memory_of_teachers_of_another_architecture_is_that_of_a_model_of_their_size(absent):
    alone, plan = plan_of("teachers.math.load=/m"), plan_of(SEVERAL)
    wide = plan.teachers["code"]
    assert wide is plan.teachers["tools"] and 32e9 < wide.parameters < 33e9
    for stage, one, own in zip(wide.stages, alone.memory, plan.memory, strict=True):
        copy = stage.parameters * 2 / GIB
        assert own.training["named teachers"] - one.training["named teachers"] == pytest.approx(copy), "one for both"
    ranks = plan.config.cluster.gpus_per_node
    assert plan.host.parts["named teachers"] == pytest.approx(ranks * 2 * wide.stages[0].parameters * 2 / GIB)
    last, tp = plan.memory[-1].training, plan.config.parallel.tensor_model_parallel_size
    assert last["output layers of teachers"] * GIB == pytest.approx(151_936 * 5120 * 2 / tp, rel=0.01)
    states = [each.memory[-1].training["teacher states"] + each.host.parts["teacher states"] for each in (alone, plan)]
    assert states[1] >= (5120 + 4096) / (2 * 4096) * states[0] > 0, "the reference is as wide as the student"
    lines = [line for line in summary(plan) if line.startswith("teachers.")]
    names = ["teachers.code", "teachers.math", "teachers.tools"]
    assert [line.partition(":")[0] for line in lines] == names
    assert ["in host memory" in line for line in lines] == [True, False, True]


def test_a_step_counts_the_passes_of_teachers_of_another_architecture(absent):
    alone, summed, product = (
        {part.name: part.work for part in plan_of(*names).parts if part.phase == "train"}
        for names in ((), (SEVERAL,), (SEVERAL, "teachers.join=product"))
    )
    assert summed["teacher"] == pytest.approx(alone["teacher"] / 3), "a third of the responses"
    assert 3.9 * summed["teacher"] < summed["teacher code"] == summed["teacher tools"] < 5 * summed["teacher"]
    assert all(product[name] == pytest.approx(3 * summed[name]) for name in ("teacher", "teacher code"))
