# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The shards of a live model, by the names and places that they have in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.model.hf.rules import MegatronSlice

Place = tuple[MegatronSlice, tuple[int, ...]]
"""A slice of a checkpoint, and the index at which a shard of it begins."""


def sharded_tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Yield the tensors of the model with the names and shards of a checkpoint."""
    for chunk in chunks:
        state_dict = unwrapped(chunk).sharded_state_dict()
        apply_factories(state_dict)
        yield from (value for value in nested_values(state_dict) if isinstance(value, ShardedTensor))


def place_of(shard: ShardedTensor, depths: Mapping[str, int]) -> Place:
    """Return the place of ``shard``.

    ``depths``: how many leading indices the rule of a key has; the other leading indices of the shard, such as the
    expert of a rule for all experts, are part of the index at which the shard begins.
    """
    depth = _depth(shard, depths)
    offsets = tuple(shard.global_offset)
    return MegatronSlice(shard.key, offsets[:depth]), offsets[depth:]


def data_of(shard: ShardedTensor, depths: Mapping[str, int]) -> Tensor:
    """Return the weights of ``shard`` with one axis of length 1 for each leading index that `place_of` moves."""
    data: Tensor = shard.data
    return data[(None,) * (shard.prepend_axis_num - _depth(shard, depths))]


def _depth(shard: ShardedTensor, depths: Mapping[str, int]) -> int:
    stacked = int(shard.prepend_axis_num)
    return min(depths.get(shard.key, stacked), stacked)
