# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Merge adapters into their base: W + scale * B A, computed in float32 and rounded once.

A merged weight of bf16 has eight significant bits: an update below half a unit in the last place is lost.  The number
of elements that rounding left as they were is reported.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.adapters.stored_adapters import (
    StoredAdapters,
    read_stored_adapters,
    require_adapters,
    require_rank_of_factors,
)
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of
from megatron_selfdistill.checkpoint.formats.model_tensors import raise_misfit, weight_shapes
from megatron_selfdistill.checkpoint.formats.tensor_names import Place
from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.full_weights import Weights, open_weights, verify_checksums
from megatron_selfdistill.interop.hf.adapter_rules import adapter_rules, factor_key, is_adapter_key
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.interop.release import Progress, write_release
from megatron_selfdistill.interop.torch_dist_tensors import Piece, TorchDistReader


class Merge:
    """The sum of weights and adapters with one scale, and the count of the elements that rounding left unchanged."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.num_elements = self.num_unchanged = 0

    def merged(self, weight: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``weight + scale * b @ a`` in ``dtype``; null keeps the type of the weight.

        Shapes: weight [out, in], a [r, in], b [out, r].
        """
        result = torch.addmm(weight.float(), b.float(), a.float(), alpha=self.scale).to(dtype or weight.dtype)
        self.num_elements += weight.numel()
        self.num_unchanged += int((result == weight).sum())
        return result

    def __str__(self) -> str:
        share = self.num_unchanged / max(self.num_elements, 1)
        left = f"rounding left {share:.1%} of the elements of the adapted layers as they were, normal after few steps"
        return f"adapters are merged: {left}; the adapters themselves are exact, and so is megatron-to-hf --dtype fp32"


class MergedWeights(Weights):
    """The `Weights` of a base with adapters merged into it."""

    def __init__(
        self, base: Weights, adapters: Weights, settings: StoredAdapters, dtype: torch.dtype | None = None
    ) -> None:
        """Merge while tensors are read; ``dtype``: the type of merged weights; null keeps that of the base's."""
        args = base.args if base.args is not None else adapters.args
        super().__init__(adapters.path, base.format, base.source, args, adapters.iteration)
        self.merge = Merge(settings.settings.scale)
        self._adapters, self._settings, self._dtype = adapters, settings.settings, dtype
        self._factors: dict[Place, tuple[Rule, Rule]] = {}

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        """Raise CheckpointError with the first differences unless base and factors match ``rules``."""
        super().check_shapes(rules)
        factors = adapter_rules(rules, self._settings)
        self._adapters.check_shapes(factors)
        for a, b in zip(factors[::2], factors[1::2], strict=True):
            self._factors[a.megatron.key, a.megatron.index] = (a, b)

    def read(self, rule: Rule) -> Tensor:
        """Return the tensor of ``rule``, without padding, merged where it has an adapter; call `check_shapes` first."""
        weight = super().read(rule)
        factors = self._factors.get((factor_key(rule.megatron.key, "a"), rule.megatron.index))
        if factors is None:
            return weight
        a, b = (self._adapters.read(factor) for factor in factors)
        return self.merge.merged(weight, a, b, self._dtype)


def open_merged_weights(
    path: Path,
    iteration: int | None = None,
    *,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Weights:
    """Return the weights of the checkpoint at ``path``, with their adapters merged, after a check of all checksums.

    ``path`` and ``iteration``: as for `open_weights`.  ``base``: the place of the base, where it has moved.  ``dtype``:
    the type in which merged weights are wanted.
    Raises: CheckpointError for a missing or corrupt checkpoint, and for another base than that of the adapters.
    """
    weights = open_weights(path, iteration)
    adapters = read_stored_adapters(weights.path)
    verify_checksums(weights, report)
    if adapters is None:
        if base is not None:
            raise CheckpointError(f"{weights.path} holds full weights, which have no base: leave out --base")
        return weights
    return MergedWeights(_opened_base(adapters, base, report), weights, adapters, dtype)


def merge_adapters(
    megatron: Path,
    out: Path,
    *,
    iteration: int | None = None,
    base: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint of adapters at ``megatron``, merged into its base, as a checkpoint; return ``out/release``.

    The result has the tensors of the base under their keys and in their types, without optimizer state.  ``base``: the
    place of the base, where it has moved.  Memory: one tensor of one layer in float32.

    Raises: CheckpointError before anything is written; OSError while it writes.
    """
    progress = progress or Progress()
    weights = open_weights(megatron, iteration)
    adapters = require_adapters(weights.path)
    verify_checksums(weights, progress.report)
    opened = _opened_base(adapters, base, progress.report)
    if opened.format != "torch_dist":
        raise CheckpointError(
            f"{opened.path} is in the legacy format: merge with megatron-to-hf, and convert the result with "
            "hf-to-megatron"
        )
    source, factors = TorchDistReader(opened.path), TorchDistReader(weights.path)
    require_rank_of_factors(weights.path, weight_shapes(factors.shapes), adapters.settings.rank)
    merge = Merge(adapters.settings.scale)
    pieces = _merged_pieces(source, factors, merge)
    objects = [key for key in source.objects if "_extra_state" in key]
    assets = hf_assets_of(opened.path) or hf_assets_of(weights.path)
    target = write_release(out, pieces, opened.args, empty_objects=objects, assets=assets, progress=progress)
    progress.report(str(merge))
    return target


def _opened_base(adapters: StoredAdapters, base: Path | None, report: Callable[[str], None]) -> Weights:
    """Return the weights of the base, after a comparison of its digest and a check of its checksums."""
    place = adapters.base_place(None if base is None else str(base), "--base")
    adapters.require_base(base_digest(place), place, "--base")
    weights = open_weights(place)
    verify_checksums(weights, report)
    return weights


def _merged_pieces(source: TorchDistReader, factors: TorchDistReader, merge: Merge) -> list[Piece]:
    """Return the pieces of the merged checkpoint, one per layer and expert, without reading tensors."""
    unused = {key: math.prod(shape[:-2]) for key, shape in weight_shapes(factors.shapes).items() if is_adapter_key(key)}
    pieces = []

    def made(key: str, index: tuple[int, ...], pair: tuple[Place, Place] | None, sizes: tuple[int, ...]) -> Tensor:
        weight = source.read(key, index)
        if pair is not None:
            a, b = (factors.read(*place) for place in pair)
            weight = merge.merged(weight, a, b)
        return weight.reshape(sizes)

    for key, shape in weight_shapes(source.shapes).items():
        leading = shape[:-2] if len(shape) > 2 else ()
        for index in itertools.product(*map(range, leading)):
            a, b = (factors.place(factor_key(key, name), index) for name in "ab")
            pair = None if a is None or b is None else (a, b)
            for place in pair or ():
                unused[place[0]] -= 1
            offset, sizes = (*index, *(0 for _ in shape[len(leading) :])), (*(1 for _ in index), *shape[len(leading) :])
            make = functools.partial(made, key, index, pair, sizes)
            pieces.append(Piece(key, shape, offset, sizes, source.dtype_at((key, ())), make))
    faults = [f"{key} is unexpected" for key, count in sorted(unused.items()) if count]
    raise_misfit(factors.directory, faults)
    return pieces
