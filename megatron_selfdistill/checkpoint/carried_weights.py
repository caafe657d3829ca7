# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tensors of a Hugging Face model that Megatron does not build, such as a vision tower, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.full_weights import Weights
from megatron_selfdistill.checkpoint.formats.safetensors_directory import WeightsDirectory, open_weights_directory
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.model.hf.family import Family
from megatron_selfdistill.model.hf.rules import PASSTHROUGH, MegatronSlice, Rule, rows


def carried_rules(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """Return one rule for each tensor that ``family`` carries along, from the shapes by Hugging Face names."""
    return [
        rows(MegatronSlice(PASSTHROUGH + name), {name: tuple(shape)})
        for name, shape in shapes.items()
        if family.carried and name.startswith(family.carried)
    ]


class CarriedWeights:
    """The weights of a model from a checkpoint, and the tensors that its family carries along.

    A converted checkpoint holds the carried tensors itself; a checkpoint of a run does not, and they come from the
    Hugging Face directory ``hf``.
    """

    def __init__(self, weights: Weights, family: Family, hf: Path | None) -> None:
        """Find the carried tensors; read none.

        Raises: CheckpointError where neither the checkpoint nor ``hf`` holds a tensor that the family carries.
        """
        self._weights = weights
        self._directory: WeightsDirectory | None = None
        self.rules = carried_rules(family, weights.passthrough)
        if not family.carried or self.rules:
            return
        found: list[Rule] = []
        if hf is not None:
            self._directory = open_weights_directory(hf)
            found = carried_rules(family, {name: held.shape for name, held in self._directory.tensors.items()})
        if not found:
            names = " and ".join(f"{prefix}*" for prefix in family.carried)
            raise CheckpointError(
                f"{weights.path} has no {names}, which {family.architecture} needs: set --hf-config to the Hugging "
                "Face directory from which the run began, with its weights"
            )
        self.rules = found

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        """Raise CheckpointError unless the checkpoint matches ``rules`` and the carried tensors that it holds."""
        self._weights.check_shapes([*rules, *(self.rules if self._directory is None else ())])

    def dtype(self, rule: Rule) -> torch.dtype:
        """Return the type of the stored tensor of ``rule``."""
        if self._directory is not None and rule.is_passthrough and rule in self.rules:
            return self._directory.tensors[rule.hf_names[0]].dtype
        return self._weights.dtype(rule)

    def read(self, rule: Rule) -> Tensor:
        """Return the tensor of ``rule``, without padding."""
        if self._directory is not None and rule.is_passthrough and rule in self.rules:
            return self._directory.read(rule.hf_names[0])
        return self._weights.read(rule)
