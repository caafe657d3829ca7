# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every data-parallel rank holds its share of the optimizer state during a save and a load, in Megatron's format."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import checkpointed_run
import layouts
import pytest
import torch
from checkpointed_run import ADAM, Setup
from tiers import combinations

BF16 = dataclasses.replace(ADAM, precision="bf16")
WHOLE = Setup(optimizer=BF16, teacher="current")
LAYOUTS = {
    "DP2": (2, WHOLE),
    "TP2xDP2": (4, WHOLE.cut(tp=2)),
    "PP2xDP2 tied": (4, dataclasses.replace(WHOLE, kind="tied").cut(pp=2)),
    "EP2xDP2": (4, dataclasses.replace(WHOLE, kind="moe").cut(ep=2)),
}


def held(states: Any) -> list[torch.Tensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return [one.data for one in nested_values(states) if isinstance(one, ShardedBase) and torch.is_tensor(one.data)]


def bytes_for_saving_and_loading(setup: Setup, run_dir: Path) -> tuple[int, int, int, int]:
    """Return the bytes of optimizer state that a save and a load put into host memory on this rank, and two bounds.

    The bounds are 12 bytes per parameter of the model shard, and 12 bytes per element of the largest parameter.
    """
    from megatron_selfdistill.checkpoint import state
    from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT
    from megatron_selfdistill.model.forward import unwrapped

    run = checkpointed_run.start(setup, run_dir, steps=1)
    model = state.model_state(run.chunks, CONTENT)
    saved = state.optimizer_state(run.optimizer, model, CONTENT)
    loaded = state.optimizer_state(run.optimizer, model, CONTENT, is_loading=True)
    sizes = [param.numel() for chunk in run.chunks for param in unwrapped(chunk).parameters()]
    counted = [sum({t.data_ptr(): t.nbytes for t in held(states)}.values()) for states in (saved, loaded)]
    return counted[0], counted[1], 12 * sum(sizes), 12 * max(sizes)


@pytest.mark.parametrize("name", ["DP2", "EP2xDP2"])
def test_a_rank_holds_its_share_of_the_optimizer_state_and_at_most_one_parameter_more(ranks, tmp_path, name):
    world_size, setup = LAYOUTS[name]
    per_rank = ranks.run(bytes_for_saving_and_loading, setup, tmp_path, world_size=world_size)
    for saved, loaded, whole, largest in per_rank:
        assert saved <= whole / 2 + largest
        assert loaded <= whole / 2 + largest
        assert min(saved, loaded) > whole / 4
    if name == "DP2":  # nothing is held twice
        assert sum(saved for saved, *_ in per_rank) == per_rank[0][2]


def described(setup: Setup, run_dir: Path) -> tuple[dict, dict]:
    """Return the optimizer state that this program and Megatron would write on this rank, by key and offset."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_selfdistill.checkpoint import sharded_io, state
    from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT

    def written(states: Any) -> dict:
        tensors = [one for one in sharded_io.tensors({"optimizer": states}) if is_main_replica(one.replica_id)]
        return {(one.key, one.global_offset, one.global_shape): one.data.clone() for one in tensors}

    run = checkpointed_run.start(setup, run_dir, steps=2)
    model = state.model_state(run.chunks, CONTENT)
    ours = written(state.optimizer_state(run.optimizer, model, CONTENT))
    return ours, written(run.optimizer.sharded_state_dict(model, metadata=CONTENT))


@combinations(name=list(LAYOUTS), quick={"name": ["PP2xDP2 tied", "EP2xDP2"]}, strength=1)
def test_the_ranks_together_write_what_megatron_writes(ranks, tmp_path, name):
    world_size, setup = LAYOUTS[name]
    per_rank = ranks.run(described, setup, tmp_path, world_size=world_size)
    ours, theirs = ({place: t for pair in per_rank for place, t in pair[i].items()} for i in (0, 1))
    assert ours.keys() == theirs.keys()
    assert sum(len(own) for own, _ in per_rank) == len(ours), "each is written by one rank"
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)


def with_small_buckets(run: Any, setup: Setup, run_dir: Path) -> Any:
    """``run`` in buckets of a few parameters each, whose ends are padded where 3 ranks share them."""
    from megatron_selfdistill.checkpoint import optimizer_shards
    from megatron_selfdistill.model import build

    small = functools.partial(build.DistributedDataParallelConfig, bucket_size=3000)
    with (
        mock.patch.object(build, "DistributedDataParallelConfig", small),
        mock.patch.object(optimizer_shards, "EXCHANGED_ELEMENTS", 700),
    ):
        return run(setup, run_dir)


def num_padded_buckets(setup: Setup, run_dir: Path) -> int:
    run = checkpointed_run.start(setup, run_dir)
    (single,) = run.optimizer.chained_optimizers
    buckets = [bucket for buffer in single.buffers for bucket in buffer.buckets]
    return sum(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buckets)


@pytest.mark.full
def test_padded_buckets_and_an_exchange_in_many_rounds_resume_bit_for_bit(ranks, tmp_path):
    overlapped = dataclasses.replace(BF16, overlap_grad_reduce=True, overlap_param_gather=True)
    setup = dataclasses.replace(WHOLE, optimizer=overlapped)
    assert min(ranks.run(with_small_buckets, num_padded_buckets, setup, tmp_path, world_size=3)) > 2
    never_stopped = ranks.run(with_small_buckets, checkpointed_run.save_and_go_on, setup, tmp_path, world_size=3)
    resumed = ranks.run(with_small_buckets, checkpointed_run.resume_and_go_on, setup, tmp_path, world_size=3)
    on_one_rank = ranks.run(checkpointed_run.resume_and_go_on, WHOLE, tmp_path, world_size=1)
    for ends, what, most in ((resumed, "parameters", 0), (resumed, "weights", 0), (on_one_rank, "parameters", 1e-6)):
        found, expected = (layouts.join([end[what] for end in run]) for run in (ends, never_stopped))
        worst, where = layouts.worst_difference(found, expected)
        assert worst <= most, (what, where)
