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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.directory import find
from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH, Place, raise_misfit, shown
from megatron_selfdistill.checkpoint.formats.saved_run import is_selfdistill_checkpoint
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.interop.legacy import LegacyReader
from megatron_selfdistill.interop.torch_dist_tensors import TorchDistReader

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(eq=False)
class Weights:
    """The weights of a complete Megatron checkpoint."""

    path: Path
    format: str
    """The name of the format of the checkpoint, for people."""
    source: TorchDistReader | LegacyReader
    args: argparse.Namespace | None
    """The stored arguments; None if the checkpoint stores none."""
    iteration: int
    """The iteration of the checkpoint; 0 for ``release``."""

    @property
    def num_rows(self) -> int:
        """The number of rows of the stored embedding, including padding."""
        place = self.source.place(_EMBEDDING, ())
        if place is None:
            raise CheckpointError(f"{self.path} does not fit this model: {_EMBEDDING} is missing")
        return self.source.full_shape(place, ())[0]

    @property
    def passthrough(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that the checkpoint keeps for conversions, by their Hugging Face names."""
        shapes = self.source.shapes if isinstance(self.source, TorchDistReader) else {}
        return {key.removeprefix(PASSTHROUGH): shapes[key] for key in shapes if key.startswith(PASSTHROUGH)}

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        """Raise CheckpointError with the first differences unless the stored tensors match ``rules``."""
        faults, used = [], set[Place]()
        for rule in rules:
            place = self.place(rule)
            if place is None:
                faults.append(f"{_shown(rule)} is missing")
                continue
            used.add(place)
            found = self.source.full_shape(place, rule.shape)
            padded = rule.vocabulary and len(found) == len(rule.shape) and found[0] >= rule.shape[0]
            if found != rule.shape and not (padded and found[1:] == rule.shape[1:]):
                faults.append(f"{_shown(rule)} has shape {list(found)}, expected {list(rule.shape)}")
        raise_misfit(self.path, [*faults, *self.source.unused(used)])

    def dtype(self, rule: Rule) -> torch.dtype:
        """Return the type of the stored tensor of ``rule``."""
        place = self.place(rule)
        assert place is not None, "call check_shapes first"
        return self.source.dtype_at(place)

    def read(self, rule: Rule) -> Tensor:
        """Return the tensor of ``rule``, without padding."""
        place = self.place(rule)
        assert place is not None, "call check_shapes first"
        return self.source.read_at(place, rule.shape, rule.shape[0] if rule.vocabulary else None)

    def place(self, rule: Rule) -> Place | None:
        """Return the place of the tensor of ``rule``; None if the checkpoint lacks it."""
        return self.source.place(rule.megatron.key, rule.megatron.index)


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

    Raises: CheckpointError for a missing or corrupt checkpoint.
    """
    found, is_legacy = find(directory.of_iteration(Path(path), iteration))
    if is_legacy:
        legacy = LegacyReader(found)
        return Weights(found, "torch (legacy: one file per model-parallel rank)", legacy, legacy.args, legacy.iteration)
    source = TorchDistReader(found)
    common = source.common
    stored = int(common.get("iteration") or directory.iteration_of(found))
    return Weights(found, "torch_dist", source, common.get("args"), stored)


def _shown(rule: Rule) -> str:
    return shown(rule.megatron.key, rule.megatron.index)
