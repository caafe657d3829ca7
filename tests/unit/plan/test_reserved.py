# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reserved memory of a rank: the communicators that a step uses, and an engine's graphs."""

from __future__ import annotations

import pytest
import tiny_run
import torch.distributed as dist

from megatron_selfdistill.config import load
from megatron_selfdistill.distributed import ranks as rank_groups
from megatron_selfdistill.plan.dry_run import Plan, dry_run
from megatron_selfdistill.plan.memory import GIB
from megatron_selfdistill.plan.reserved import communicators, graphs_gib

NAMES = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "CONTEXT_PARALLEL_GROUP": "context",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data with context",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer instance",
    "MODEL_PARALLEL_GROUP": "optimizer instance",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tensor and expert",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
}
"""Megatron's description of a group -> its name in a plan."""
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=32")
LAYOUTS = {
    "TP 2, DP 2": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "PP 2, DP 2, tied": ("parallel.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true"),
    "TP 2, EP 2": (
        *("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
        *("parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1", *EXPERTS),
    ),
    "CP 2, DP 2": ("parallel.context_parallel_size=2",),
    "TP 2, PP 2, SGD": (
        *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
        *("optimizer.use_distributed_optimizer=false", "parallel.sequence_parallel=true"),
    ),
}


def groups_in_use(arguments: list[str]) -> dict[str, int]:
    """Return the groups of this rank with collectives in a run -> their sizes.

    Gloo counts the collectives of a group, and NCCL makes a communicator at the first of them.
    """
    found: dict[str, int] = {}
    shutdown = rank_groups.shutdown

    def recorded() -> None:
        for group in dist.distributed_c10d._world.pg_map:
            if group.size() > 1 and group._get_sequence_number_for_group():
                found[NAMES[group.group_desc]] = group.size()
        shutdown()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_groups, "shutdown", recorded)
        assert tiny_run.start(arguments) == 0
    return found


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in list(LAYOUTS)[1:3] else pytest.mark.full) for name in LAYOUTS],
)
def test_the_communicators_are_the_groups_with_collectives_in_a_run(ranks, tmp_path, layout):
    data = tmp_path / "data"
    tiny_run.write_data(data)
    more = ("num_steps=1", "checkpoint.save_every=1000", "cluster.num_gpus=4", *LAYOUTS[layout])
    arguments = tiny_run.overrides(data, tmp_path / "run", *more)
    used = ranks.run(groups_in_use, arguments, world_size=4, init_process_group=False)
    plan = dry_run(load(arguments))
    assert communicators(plan.config, plan.stages[0]) == used[0]
    assert communicators(plan.config, plan.stages[-1]) == used[-1]


def plan_of(*overrides: str) -> Plan:
    return dry_run(load(["recipe=qwen3_8b", *overrides]))


def test_the_reserve_grows_with_communicators_and_the_graphs_of_a_colocated_engine():
    def reserved(*overrides: str) -> float:
        (memory,) = plan_of(*overrides).memory
        assert not memory.rollout or memory.rollout["reserved"] == memory.training["reserved"]
        return memory.training["reserved"]

    assert reserved() == pytest.approx(3 + 5 * 0.3 + 1), "world, TP, DP, DP with CP, the optimizer's; graphs"
    assert reserved("rollout.engine=megatron") == pytest.approx(3 + 5 * 0.3)
    assert reserved("rollout.engine_tp=2") == pytest.approx(reserved() + 0.3)
    alone = ("cluster.num_gpus=1", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    assert reserved(*alone, "rollout.engine=megatron") == 3
    served = ("rollout.placement=server", "rollout.num_servers=1")
    assert reserved(*served) == pytest.approx(3 + 6 * 0.3), "also the group with the servers"
    assert reserved(*served, "rollout.transfer=gloo") == pytest.approx(3 + 5 * 0.3)
    assert [graphs_gib(layers) for layers in (12, 36, 72, 126)] == [1, 1, 2, 3]


def test_the_gradient_of_the_output_layer_is_counted_where_the_layer_is_trained():
    (memory,) = plan_of().memory
    assert memory.training["output gradient"] * GIB == 152064 / 4 * 4096 * 2
    (adapted,) = plan_of("adapter.rank=8").memory
    assert adapted.training["output gradient"] == 0
    stages = ("parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2")
    first, last = plan_of(*stages).memory
    assert (first.training["output gradient"], last.training["output gradient"] * GIB) == (0, 152064 / 2 * 4096 * 2)
