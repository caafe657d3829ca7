# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One tensor of a Megatron checkpoint and the Hugging Face tensors that it is made of, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_selfdistill.errors import ConfigError

PASSTHROUGH = "hf_passthrough."
"""Keys of ours in a Megatron checkpoint: tensors that Megatron neither builds nor trains, kept for the way back."""


@dataclass(frozen=True)
class MegatronSlice:
    """Where a tensor lies in a torch_dist checkpoint."""

    key: str
    """As stored, such as ``decoder.layers.self_attention.linear_qkv.weight``.  Where all layers are alike their tensors
    are stacked under one key; else the key has the layer's number."""
    index: tuple[int, ...] = ()
    """Leading indices of the stored tensor: ``(layer,)``, ``(layer, expert)``, ``(expert,)`` or ``()``."""


class Arrangement(Protocol):
    """A way to put tensors into one, and back; copies and permutations only, so exact in any dtype."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor: ...

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Rows:
    """One tensor below the other (gate over up in ``linear_fc1``); a single one is itself."""

    sizes: tuple[int, ...]

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self.sizes)


@dataclass(frozen=True)
class QueryGroups:
    """Rows of q, k, v ``<->`` Megatron's ``linear_qkv``: for each query group its query heads, its key, its value."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        per_group = [t.reshape(self.num_query_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(per_group, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        queries = self.num_attention_heads // self.num_query_groups * self.kv_channels
        per_group = tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:])
        parts = per_group.split([queries, self.kv_channels, self.kv_channels], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)


@dataclass(frozen=True)
class Rule:
    """One full tensor of a Megatron checkpoint is these full Hugging Face tensors, rearranged."""

    megatron: MegatronSlice
    shape: tuple[int, ...]
    """Of the slice; vocabulary rows are the true ones, before Megatron's padding."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    arrangement: Arrangement
    float32: bool = False
    """Megatron keeps this tensor in float32 whatever the precision of the model (the router's expert bias)."""
    vocabulary: bool = False
    """The first axis is the vocabulary, which Megatron pads."""

    @property
    def is_passthrough(self) -> bool:
        """Whether no model has this tensor: it lies in checkpoints only, under `PASSTHROUGH`."""
        return self.megatron.key.startswith(PASSTHROUGH)

    def to_megatron(self, *hf_tensors: Tensor) -> Tensor:
        """The slice of shape ``shape``, from full tensors of ``hf_shapes`` in the order of ``hf_names``.

        Any dtype, any device; values are copied or permuted, never computed.
        Raises: ConfigError for another shape.
        """
        for name, shape, tensor in zip(self.hf_names, self.hf_shapes, hf_tensors, strict=True):
            _require_shape(name, shape, tensor)
        return self.arrangement.join(hf_tensors)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The exact inverse of `to_megatron`; the results may be views.  Raises: ConfigError for another shape."""
        _require_shape(self.megatron.key, self.shape, tensor)
        return self.arrangement.split(tensor)


def rows(
    megatron: MegatronSlice,
    hf: Mapping[str, tuple[int, ...]],
    *,
    float32: bool = False,
    vocabulary: bool = False,
) -> Rule:
    """The rule of one tensor, or of several below each other; ``hf``: name -> shape."""
    shapes = tuple(hf.values())
    sizes = tuple(shape[0] for shape in shapes)
    return Rule(megatron, (sum(sizes), *shapes[0][1:]), tuple(hf), shapes, Rows(sizes), float32, vocabulary)


def query_groups(megatron: MegatronSlice, hf: Mapping[str, tuple[int, ...]], arrangement: QueryGroups) -> Rule:
    """The rule of ``linear_qkv``; ``hf``: the names and shapes of q, k and v."""
    shapes = tuple(hf.values())
    return Rule(megatron, (sum(s[0] for s in shapes), *shapes[0][1:]), tuple(hf), shapes, arrangement)


def _require_shape(name: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def dequantise_blocks(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """``weight[i, j] * scale_inv[i // block[0], j // block[1]]`` in float32: published FP8 weights as numbers.

    Shapes: weight ``[n, m]`` (float8_e4m3fn), scale_inv ``[ceil(n / block[0]), ceil(m / block[1])]`` (float32, or
    float8_e8m0fnu); result ``[n, m]`` float32, from which one rounding leads to bf16.
    Raises: ConfigError where the scales do not cover the weight.
    Source: ``weight_dequant`` of DeepSeek-V3's ``inference/kernel.py``.
    """
    expected = tuple(math.ceil(size / b) for size, b in zip(weight.shape, block, strict=True))
    if tuple(scale_inv.shape) != expected:
        raise ConfigError(
            f"a weight of shape {list(weight.shape)} in blocks of {list(block)} needs scales of shape "
            f"{list(expected)}, got {list(scale_inv.shape)}"
        )
    values = weight.to(torch.float32)
    for i in range(expected[0]):
        # A row of blocks at a time: scales of the weight's own size would double the memory of the largest tensor.
        band = values[i * block[0] : (i + 1) * block[0]]
        band *= scale_inv[i].to(torch.float32).repeat_interleave(block[1])[: weight.shape[1]]
    return values
