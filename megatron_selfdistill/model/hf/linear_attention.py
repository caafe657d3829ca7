# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules of gated delta nets, and of attention with an output gate.

Megatron's side is `model.gated_delta_net.GatedDeltaNet`, whose rows are grouped by key head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.model.hf.rules import MegatronSlice, Rule, query_groups, rows


@dataclass(frozen=True)
class HeadGroups:
    """The arrangement of tensors whose rows Megatron groups by head: each group has its rows of every section."""

    num_groups: int
    sections: tuple[tuple[int, ...], ...]
    """For each tensor the rows per group of its sections, which are one below the other; a tensor that is itself
    grouped is one section."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the grouped tensor."""
        parts = []
        for tensor, sizes in zip(tensors, self.sections, strict=True):
            for part in torch.split(tensor, [self.num_groups * size for size in sizes]):
                parts.append(part.reshape(self.num_groups, -1, *tensor.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of which ``tensor`` was joined."""
        grouped = tensor.reshape(self.num_groups, -1, *tensor.shape[1:])
        flat = [size for sizes in self.sections for size in sizes]
        parts = iter([part.flatten(0, 1) for part in torch.split(grouped, flat, dim=1)])
        return tuple(torch.cat([next(parts) for _ in sizes]) for sizes in self.sections)


@dataclass(frozen=True)
class GatedQueryGroups:
    """The arrangement of q, k and v in a ``linear_qkv`` with an output gate.

    Each query group has its query heads, their gates, its key and its value; q of transformers has for each head its
    query and its gate.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return ``linear_qkv`` from q with its gates, k and v."""
        q, *others = tensors
        q = q.reshape(self.num_query_groups, -1, 2, self.kv_channels, *q.shape[1:]).transpose(1, 2).flatten(1, 3)
        return torch.cat([q, *(t.reshape(self.num_query_groups, -1, *t.shape[1:]) for t in others)], dim=1).flatten(
            0, 1
        )

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return q with its gates, k and v from ``linear_qkv``."""
        queries = self.num_attention_heads // self.num_query_groups * self.kv_channels
        grouped = tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:])
        q, k, v = torch.split(grouped, [2 * queries, self.kv_channels, self.kv_channels], dim=1)
        q = q.reshape(self.num_query_groups, 2, -1, self.kv_channels, *tensor.shape[1:]).transpose(1, 2)
        return q.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)


def gated_delta_rules(
    arch: dict[str, Any], hf: str, place: Callable[..., MegatronSlice], fused_projections: bool
) -> Iterator[Rule]:
    """Yield the rules of the gated delta net of one transformer layer, named ``hf``, with the norm before it.

    ``fused_projections``: whether transformers has q, k, v and z in one tensor, grouped as Megatron groups them, and
    beta and alpha in another; else it has q, k and v in one tensor, one below the other, and z, beta and alpha alone.
    """
    hidden, kernel = arch["hidden_size"], arch["linear_conv_kernel_dim"]
    key, value = arch["linear_key_head_dim"], arch["linear_value_head_dim"]
    groups, heads = arch["linear_num_key_heads"], arch["linear_num_value_heads"]
    values, each = heads // groups * value, heads // groups
    sections: dict[str, tuple[int, ...]]
    if fused_projections:
        sections = {"in_proj_qkvz": (2 * key + 2 * values,), "in_proj_ba": (2 * each,)}
    else:
        sections = {
            "in_proj_qkv": (key, key, values),
            "in_proj_z": (values,),
            "in_proj_b": (each,),
            "in_proj_a": (each,),
        }
    name = f"{hf}.linear_attn"
    yield rows(place("self_attention.in_proj.layer_norm_weight"), {f"{hf}.input_layernorm.weight": (hidden,)})
    projections: dict[str, tuple[int, ...]] = {
        f"{name}.{part}.weight": (groups * sum(sizes), hidden) for part, sizes in sections.items()
    }
    arrangement = HeadGroups(groups, tuple(sections.values()))
    yield query_groups(place("self_attention.in_proj.weight"), projections, arrangement)
    channels = {f"{name}.conv1d.weight": (groups * (2 * key + values), 1, kernel)}
    yield query_groups(place("self_attention.conv1d.weight"), channels, HeadGroups(groups, ((key, key, values),)))
    for ours in ("dt_bias", "A_log"):
        yield rows(place(f"self_attention.{ours}"), {f"{name}.{ours}": (heads,)})
    yield rows(place("self_attention.out_norm.weight"), {f"{name}.norm.weight": (value,)})
    yield rows(place("self_attention.out_proj.weight"), {f"{name}.out_proj.weight": (hidden, heads * value)})
