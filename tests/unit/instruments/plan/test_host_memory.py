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


def host(*overrides: str) -> dict[str, float]:
    found = dry_run(load(["recipe=qwen3_8b", *overrides])).host
    return found.parts


def test_more_nodes_share_a_save():
    one, two = host(), host("cluster.num_gpus=16")
    assert two["optimizer in a save"] == pytest.approx(one["optimizer in a save"] / 2)


def test_the_offloaded_teacher_and_rows_that_exceed_their_store_are_held_all_the_time():
    offloaded = host("teacher.offload=cpu", "schedule.teacher_store_gb=0", "schedule.pair_order=teacher_first")
    parameters = 8_190_735_360
    plan = dry_run(load(["recipe=qwen3_8b"]))
    copies = 8 * plan.stages[0].parameters / parameters
    assert offloaded["teacher"] == pytest.approx(copies * 2 * parameters / GIB)
    on_device = (
        dry_run(load(["recipe=qwen3_8b", "schedule.pair_order=teacher_first"])).memory[0].training["teacher states"]
    )
    assert offloaded["teacher states"] == pytest.approx(8 * on_device)
    average = host("teacher.offload=cpu", "teacher.weights=ema")
    assert average["teacher"] == pytest.approx(3 * offloaded["teacher"])
    assert average["teacher in a save"] > 0 == host()["teacher"]
    current = host("teacher.offload=cpu", "teacher.weights=current")
    assert current["reference"] == pytest.approx(offloaded["teacher"]) and current["teacher"] == 0
    assert offloaded["reference"] == 0, "a frozen teacher is the reference"


def test_frozen_weights_of_sleeping_engines_rest_in_host_memory():
    weights = 8 * 8_190_735_360 * 2 / GIB  # an engine on each GPU of the node
    assert host()["engine weights"] == 0
    assert weights < host("adapter.rank=8")["engine weights"] < 1.01 * weights


def test_a_checkpoint_holds_what_is_trained_with_its_optimizer_state():
    parameters = 8_190_735_360
    whole = load(["recipe=qwen3_8b"])
    assert checkpoint_bytes(whole, parameters) == 14 * parameters
    assert f"a checkpoint takes {14 * parameters / 1e9:.1f} GB" in summary(dry_run(whole))
    assert checkpoint_bytes(load(["recipe=qwen3_8b", "teacher.weights=ema"]), parameters) == 18 * parameters
    adapted = dry_run(load(["recipe=qwen3_8b", "adapter.rank=8"]))
    assert f"a checkpoint takes {14 * adapted.adapter_parameters / 1e9:.1f} GB" in summary(adapted)
    assert host("adapter.rank=8")["weights in a save"] < host()["weights in a save"] / 100


@pytest.fixture
def absent(monkeypatch) -> None:
    """Let the directories of teachers not be there, as on a machine that plans; all have the student's architecture."""

    def copies(config: Config) -> list[tuple[ModelConfig, dict[str, Path]]]:
        directories = {name: Path(it.load) for name, it in config.named_teachers.items() if it.load is not None}
        return [(config.model, directories)] if directories else []

    monkeypatch.setattr(dry_run_module, "require_teachers", lambda config: None)
    monkeypatch.setattr(dry_run_module, "teacher_copies", copies)


def test_named_teachers_share_one_copy_on_the_device_and_several_rest_in_host_memory(absent):
    math, code = "teachers.math.load=/math", "teachers.code.load=/code"
    plans = [dry_run(load(["recipe=qwen3_8b", *names])) for names in ((), (math,), (math, code))]
    none, one, two = (plan.memory[0].training for plan in plans)
    assert "named teachers" not in none
    assert one["named teachers"] == two["named teachers"] == none["teacher"] > 0, "as large as the start, the reference"
    rest = [plan.host.parts.get("named teachers", 0.0) for plan in plans]
    assert rest[:2] == [0, 0] and rest[2] == pytest.approx(2 * 8 * two["named teachers"])
    assert host(math, "teacher.offload=cpu")["named teachers"] == pytest.approx(rest[2] / 2)
    lines = summary(plans[2])
    assert [line.partition(":")[0] for line in lines if line.startswith("teachers.")] == [
        "teachers.code",
        "teachers.math",
    ]
    beside_student = dry_run(load(["recipe=qwen3_8b", math, "target.anchor=student"])).memory[0].training
    assert beside_student["teacher"] == 0 < beside_student["named teachers"], "nothing reads the start"


def planned_beside(monkeypatch, *options: str) -> Plan:
    """Return the plan of 8 billion parameters with a teacher of their architecture, and two of 32 billion."""
    wide, others = load(["recipe=qwen3_32b"]).model, {"code": Path("/c"), "tools": Path("/t")}
    monkeypatch.setattr(
        dry_run_module, "teacher_copies", lambda config: [(config.model, {"math": Path("/m")}), (wide, others)]
    )
    named = "teachers={math: {load: /m}, code: {load: /c}, tools: {load: /t}}"
    return dry_run(load(["recipe=qwen3_8b", named, *options]))


def test_the_memory_of_teachers_of_another_architecture_is_that_of_a_model_of_their_size(absent, monkeypatch):
    alone = dry_run(load(["recipe=qwen3_8b", "teachers.math.load=/m"]))
    plan = planned_beside(monkeypatch)
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
    assert [line.partition(":")[0] for line in lines] == ["teachers.code", "teachers.math", "teachers.tools"]
    assert [("another model of" in line, "in host memory" in line) for line in lines] == [
        (True, True),
        (False, False),
        (True, True),
    ]


def test_a_step_counts_the_passes_of_teachers_of_another_architecture(absent, monkeypatch):
    def work(plan: Plan) -> dict[str, float]:
        return {part.name: part.work for part in plan.parts if part.phase == "train"}

    alone, summed = work(dry_run(load(["recipe=qwen3_8b"]))), work(planned_beside(monkeypatch))
    product = work(planned_beside(monkeypatch, "teachers.join=product"))
    assert summed["teacher"] == pytest.approx(alone["teacher"] / 3), "a third of the responses"
    assert 3.9 * summed["teacher"] < summed["teacher code"] == summed["teacher tools"] < 5 * summed["teacher"]
    assert all(product[name] == pytest.approx(3 * summed[name]) for name in ("teacher", "teacher code"))
