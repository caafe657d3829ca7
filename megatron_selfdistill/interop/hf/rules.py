# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert one tensor of a Megatron checkpoint into the Hugging Face tensors of which it consists, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH
from megatron_selfdistill.errors import ConfigError


def passthrough_layer(name: str) -> str:
    """Return the layer of a passthrough tensor with the Hugging Face name ``name``.

    It is 61 for ``model.layers.61.eh_proj.weight``; the tensors of a module beside the model, such as
    ``mtp.fc.weight``, belong together, to mtp.
    """
    first, _, *rest = name.split(".")
    return rest[0] if first == "model" else first


@dataclass(frozen=True)
class MegatronSlice:
    """The place of a tensor in a torch_dist checkpoint."""

    key: str
    """The stored key, such as ``decoder.layers.self_attention.linear_qkv.weight``.

    Layers of one kind are stacked under one key; else the key contains the number of the layer.
    """
    index: tuple[int, ...] = ()
    """The leading indices of the stored tensor: ``(layer,)``, ``(layer, expert)``, ``(expert,)`` or ``()``."""


def stack_shapes(slices: Iterable[MegatronSlice]) -> dict[str, tuple[int, ...]]:
    """Return the leading shape of the stored tensor of each key: one more than the largest of its indices."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in slices:
        seen = shapes.get(place.key, (0,) * len(place.index))
        shapes[place.key] = tuple(max(a, b + 1) for a, b in zip(seen, place.index, strict=True))
    return shapes


class Arrangement(Protocol):
    """A way to join tensors into one tensor and to split it again, by copies and permutations, exact in any dtype."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the joined tensor."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of which ``tensor`` was joined."""


@dataclass(frozen=True)
class Rows:
    """An arrangement of tensors one below the other, such as gate above up in ``linear_fc1``."""

    sizes: tuple[int, ...]

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the concatenation of ``tensors``; a single tensor is returned itself."""
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the row blocks of ``tensor``, as views."""
        return torch.split(tensor, list(self.sizes))


@dataclass(frozen=True)
class Fused:
    """The arrangement of one tensor in which a family has fused several tensors, such as ``qkv_proj``: q, k, then v."""

    inner: Arrangement
    """The arrangement of the single tensors."""
    sizes: tuple[int, ...]
    """The number of rows of each single tensor."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return Megatron's tensor from the fused one."""
        (fused_tensor,) = tensors
        return self.inner.join(torch.split(fused_tensor, list(self.sizes)))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the fused tensor from Megatron's."""
        return (torch.cat(self.inner.split(tensor)),)


@dataclass(frozen=True)
class FusedExperts:
    """The arrangement of one tensor of all experts of a layer: the first axis is the expert in both programs.

    A weight is [experts, in, out] in Hugging Face and [experts, out, in] in Megatron.  A bias is [experts, out].
    """

    interleaved: bool
    """Whether the output rows alternate between gate and up in Hugging Face; Megatron has the gate above up."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return Megatron's tensor."""
        (tensor,) = tensors
        if tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1) if self.interleaved else tensor.contiguous()

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensor."""
        if self.interleaved:
            tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        # Always a copy: vLLM's loader clears the second bias that it gets on all but one of its ranks.
        return ((tensor.transpose(1, 2) if tensor.dim() == 3 else tensor).clone(memory_format=torch.contiguous_format),)


@dataclass(frozen=True)
class Rule:
    """The equality of one full tensor of a Megatron checkpoint and some full Hugging Face tensors, rearranged."""

    megatron: MegatronSlice
    shape: tuple[int, ...]
    """The shape of the Megatron tensor, without Megatron's padding of the vocabulary."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    arrangement: Arrangement
    float32: bool = False
    """Whether Megatron keeps the tensor in float32 for every precision of the model, as the router's expert bias."""
    vocabulary: bool = False
    """Whether the first axis is the vocabulary, which Megatron pads."""
    may_be_absent: bool = False
    """Whether some directories lack the tensor, a copy of another tensor in a multi-token-prediction layer."""
    num_experts: int | None = None
    """The length of the first axis where it is the expert; None if each expert has a rule of its own.

    A checkpoint stores the same tensors either way; a live model has a shard for each expert.
    """

    @property
    def is_passthrough(self) -> bool:
        """Whether the tensor exists in checkpoints only, under `PASSTHROUGH`, and in no model."""
        return self.megatron.key.startswith(PASSTHROUGH)

    def to_megatron(self, *hf_tensors: Tensor) -> Tensor:
        """Return the Megatron tensor, of ``shape``, from the Hugging Face tensors, in the order of ``hf_names``.

        The tensors may have any dtype and device; the method copies or permutes values and never computes them.

        Raises: ConfigError for a tensor of another shape.
        """
        for name, shape, tensor in zip(self.hf_names, self.hf_shapes, hf_tensors, strict=True):
            _require_shape(name, shape, tensor)
        return self.arrangement.join(hf_tensors)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors, possibly as views, from the Megatron tensor: the inverse of `to_megatron`.

        Raises: ConfigError for a tensor of another shape.
        """
        _require_shape(self.megatron.key, self.shape, tensor)
        return self.arrangement.split(tensor)


def rows(
    megatron: MegatronSlice,
    hf: Mapping[str, tuple[int, ...]],
    arrangement: Arrangement | None = None,
    *,
    float32: bool = False,
    vocabulary: bool = False,
    may_be_absent: bool = False,
) -> Rule:
    """Return the rule of one tensor, or of several tensors with their rows in one; ``hf`` has their shapes by name.

    ``arrangement``: the order of the rows; null puts one tensor below the other.
    """
    shapes = tuple(hf.values())
    sizes = tuple(shape[0] for shape in shapes)
    shape, order = (sum(sizes), *shapes[0][1:]), arrangement or Rows(sizes)
    return Rule(megatron, shape, tuple(hf), shapes, order, float32, vocabulary, may_be_absent)


def fused(rule: Rule, name: str) -> Rule:
    """Return ``rule`` with its Hugging Face tensors, one below the other, as the single tensor ``name``."""
    sizes = tuple(shape[0] for shape in rule.hf_shapes)
    arrangement = Rows((sum(sizes),)) if isinstance(rule.arrangement, Rows) else Fused(rule.arrangement, sizes)
    return replace(rule, hf_names=(name,), hf_shapes=((sum(sizes), *rule.hf_shapes[0][1:]),), arrangement=arrangement)


def renamed(rule: Rule, change: Callable[[str], str]) -> Rule:
    """Return ``rule`` with ``change`` of each of its Hugging Face names."""
    return replace(rule, hf_names=tuple(map(change, rule.hf_names)))


def _require_shape(name: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def dequantise_blocks(weight: Tensor, scale_inv: Tensor, block: Sequence[int]) -> Tensor:
    """Return ``weight[i, j] * scale_inv[i // block[0], j // block[1]]`` in float32: published FP8 weights as numbers.

    Shapes: weight ``[n, m]`` (float8_e4m3fn), scale_inv ``[ceil(n / block[0]), ceil(m / block[1])]`` (float32, or
    float8_e8m0fnu); result ``[n, m]`` float32, whose conversion to bf16 rounds once.

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
        # One row of blocks at a time: scales of the size of the weight would double the memory of the largest tensor.
        band = values[i * block[0] : (i + 1) * block[0]]
        band *= scale_inv[i].to(torch.float32).repeat_interleave(block[1])[: weight.shape[1]]
    return values
