# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read the weights of any Megatron checkpoint, torch_dist or legacy, as full tensors by the rules of a mapping.

    weights = open_weights(Path("runs/first/checkpoints"))
    weights.args, weights.iteration, weights.num_rows
    weights.check_shapes(rules)
    weights.read(rule)

Layer specs, stacking and padding make no difference to the caller.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.directory import find
from megatron_selfdistill.checkpoint.formats.legacy import LegacyReader
from megatron_selfdistill.checkpoint.formats.saved_run import is_selfdistill_checkpoint
from megatron_selfdistill.checkpoint.formats.tensor_names import Place, places, shown
from megatron_selfdistill.checkpoint.formats.torch_dist import TorchDistReader
from megatron_selfdistill.errors import CheckpointError, first_few
from megatron_selfdistill.interop.hf.mapping import PASSTHROUGH, Rule
from megatron_selfdistill.interop.hf.rules import passthrough_layer

NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "teacher.")
"""The prefixes of keys in a checkpoint that do not belong to the model."""

NOT_BUILT = ("mtp.", PASSTHROUGH)
"""The prefixes of multi-token-prediction layers, which some checkpoints have and no model of this program has."""

_EMBEDDING = "embedding.word_embeddings.weight"


class Weights(Protocol):
    """The weights of a complete Megatron checkpoint."""

    path: Path
    format: str
    """The format: ``torch_dist``, or ``torch`` for legacy."""
    args: argparse.Namespace | None
    """The stored arguments; None if the checkpoint stores no arguments."""
    iteration: int
    """The iteration of the checkpoint; 0 for ``release``."""

    @property
    def num_rows(self) -> int:
        """The number of rows of the stored embedding, including padding."""
        ...

    @property
    def num_passthrough_layers(self) -> int:
        """The number of multi-token-prediction layers that the checkpoint keeps for conversions."""
        return _num_passthrough_layers(self.passthrough)

    @property
    def passthrough(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that the checkpoint keeps for conversions, by their Hugging Face names."""
        return {}

    def holds(self, rule: Rule) -> bool:
        """Return whether the checkpoint holds the tensor of ``rule``."""
        ...

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        """Raise CheckpointError with the first differences unless the stored tensors match ``rules``."""
        ...

    def dtype(self, rule: Rule) -> torch.dtype:
        """Return the type of the stored tensor of ``rule``."""
        ...

    def read(self, rule: Rule) -> Tensor:
        """Return the tensor of ``rule``, without padding."""
        ...

    def sizes(self) -> dict[torch.dtype, int]:
        """Return the number of elements of the model's tensors by type, including padding."""
        ...


def verify_checksums(weights: Weights, report: Callable[[str], None] = lambda _: None) -> None:
    """Raise CheckpointError with the first corrupt file unless all files have the checksums of the manifest.

    The function reads every file once.  Without a manifest it checks nothing, and ``report`` receives a message:
    checkpoints of other programs have no manifest, and a checkpoint of this program may have lost it.
    """
    entries = manifest.read(weights.path)
    if entries is None:
        lost = ", although this program saved one" if is_selfdistill_checkpoint(weights.path) else ""
        report(f"{weights.path} has no {manifest.NAME}{lost}: its contents cannot be checked")
    elif (fault := manifest.wrong_contents(weights.path, entries)) is not None:
        raise CheckpointError(f"{weights.path} {fault}")


def open_weights(path: Path, iteration: int | None = None) -> Weights:
    """Return the weights of the checkpoint at ``path``.

    ``path``: an ``iter_`` or ``release`` directory, or the directory with Megatron's tracker file.  ``iteration``: the
    iteration to open instead of the tracked iteration.

    Raises: CheckpointError for a missing or corrupt checkpoint; the message names the newest complete checkpoint
    nearby.
    """
    path = Path(path)
    found, legacy = find(directory.of_iteration(path, iteration))
    return _LegacyWeights(found) if legacy else _TorchDistWeights(found)


def weight_shapes(source: TorchDistReader) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors in a torch_dist checkpoint by key, without the state of the optimizer.

    The state of a parameter has a key that ends like the key of the parameter itself.
    """
    return {key: shape for key, shape in source.shapes.items() if not key.startswith(NOT_WEIGHTS)}


class _StoredWeights(Weights, Protocol):
    def place(self, rule: Rule) -> Place | None: ...

    def holds(self, rule: Rule) -> bool:
        return self.place(rule) is not None


class _TorchDistWeights(_StoredWeights):
    """The `Weights` of a torch_dist checkpoint."""

    format = "torch_dist"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = TorchDistReader(path)
        common = self._source.common
        self.args = common.get("args")
        self.iteration = int(common.get("iteration") or directory.iteration_of(path))

    @property
    def num_rows(self) -> int:
        if _EMBEDDING not in self._source.shapes:
            raise CheckpointError(f"{self.path} does not fit this model: {_EMBEDDING} is missing")
        return self._source.shapes[_EMBEDDING][0]

    @property
    def passthrough(self) -> dict[str, tuple[int, ...]]:
        shapes = self._source.shapes
        return {key.removeprefix(PASSTHROUGH): shapes[key] for key in shapes if key.startswith(PASSTHROUGH)}

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        faults, used = [], dict[str, list[int]]()
        for rule in rules:
            place = self.place(rule)
            if place is None:
                faults.append(f"{_shown(rule)} is missing")
                continue
            key, index = place
            shape = self._source.shapes[key]
            used.setdefault(key, []).append(len(index))
            faults += _shape_faults(rule, shape[len(index) :])
        for key, shape in weight_shapes(self._source).items():
            if key not in used:
                faults.append(f"{key} is unexpected")
            elif (count := math.prod(shape[: used[key][0]])) != len(used[key]):
                faults.append(f"{key} holds {count} tensors, expected {len(used[key])}")
        raise_misfit(self.path, faults)

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._source.dtype(_known(self, rule)[0])

    def read(self, rule: Rule) -> Tensor:
        key, index = _known(self, rule)
        return self._source.read(key, index, rule.shape[0] if rule.vocabulary else None)

    def sizes(self) -> dict[torch.dtype, int]:
        sizes: dict[torch.dtype, int] = {}
        for key, shape in weight_shapes(self._source).items():
            dtype = self._source.dtype(key)
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return sizes

    def place(self, rule: Rule) -> Place | None:
        found = (place for place in places(rule.megatron.key, rule.megatron.index) if place[0] in self._source.shapes)
        return next(found, None)


class _LegacyWeights(_StoredWeights):
    """The `Weights` of a legacy checkpoint."""

    format = "torch"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = LegacyReader(path)
        self.args: argparse.Namespace | None = self._source.args
        self.iteration = self._source.iteration

    @property
    def num_rows(self) -> int:
        place = self._source.place(_EMBEDDING, ())
        if place is None:
            raise CheckpointError(f"{self.path} does not fit this model: {_EMBEDDING} is missing")
        return self._source.full_shape(place, ())[0]

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        faults, used = [], set()
        for rule in rules:
            place = self.place(rule)
            if place is None:
                faults.append(f"{_shown(rule)} is missing")
                continue
            used.add(place)
            faults += _shape_faults(rule, self._source.full_shape(place, rule.shape))
        faults += [f"{shown(key, index)} is unexpected" for key, index in sorted(self._source.tensors - used)]
        raise_misfit(self.path, faults)

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._source.dtype(_known(self, rule))

    def read(self, rule: Rule) -> Tensor:
        tensor = self._source.read(_known(self, rule), rule.shape)
        return tensor[: rule.shape[0]] if rule.vocabulary else tensor

    def sizes(self) -> dict[torch.dtype, int]:
        return self._source.sizes()

    def place(self, rule: Rule) -> Place | None:
        return self._source.place(rule.megatron.key, rule.megatron.index)


def _known(weights: _StoredWeights, rule: Rule) -> Place:
    place = weights.place(rule)
    if place is None:
        raise CheckpointError(f"{weights.path} does not fit this model: {_shown(rule)} is missing")
    return place


def _shape_faults(rule: Rule, found: tuple[int, ...]) -> list[str]:
    padded = rule.vocabulary and len(found) == len(rule.shape) and found[0] >= rule.shape[0]
    if found == rule.shape or (padded and found[1:] == rule.shape[1:]):
        return []
    return [f"{_shown(rule)} has shape {list(found)}, expected {list(rule.shape)}"]


def _num_passthrough_layers(names: Iterable[str]) -> int:
    """Return the number of multi-token-prediction layers in names such as ``model.layers.61.eh_proj.weight``."""
    return len({passthrough_layer(name) for name in names if name.startswith(("model.layers.", "mtp."))})


def _shown(rule: Rule) -> str:
    return shown(rule.megatron.key, rule.megatron.index)


def raise_misfit(path: Path, faults: Sequence[str]) -> None:
    """Raise CheckpointError with the first of ``faults``, the differences to the model, if there are any."""
    if faults:
        raise CheckpointError(f"{path} does not fit this model: {first_few(faults)}")


def is_finite(tensor: Tensor) -> Tensor:
    """Return whether all elements are finite, as a boolean scalar on the tensor's device; True for integers.

    The function makes one pass without a temporary tensor: NaN propagates through the minimum and the maximum, and an
    infinity is the minimum or the maximum.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor.detach())
    return torch.isfinite(low) & torch.isfinite(high)


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; wait for the device once."""
    names, flags = [], []
    for name, tensor in named:
        names.append(name)
        flags.append(is_finite(tensor))
    if not flags:
        return []
    return [name for name, finite in zip(names, torch.stack(flags).tolist(), strict=True) if not finite]
