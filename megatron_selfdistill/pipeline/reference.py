# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference: frozen weights on the student's contexts, whose logits the target mixes with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel

from megatron_selfdistill.loss.sharded.vocab_entropy import vocab_entropy
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target, unit_mix
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.model.forward import project
from megatron_selfdistill.model.output_layer import nonlinear


@dataclass(frozen=True)
class Reference:
    """The frozen model on the student's contexts, and its part of a target that is anchored to it."""

    target: Target
    """The target, which is anchored to a reference."""
    chunks: Sequence[torch.nn.Module]
    """The reference's chunks on this rank, cut like the student's; the teacher's own where one copy serves as both."""
    chunk_tokens: int = 4096
    """The number of tokens whose logits of the reference exist at a time."""
    backend: str | None = None
    """As for `distillation_loss`."""

    @property
    def last(self) -> GPTModel:
        """The model whose output layer projects the reference's states, on the last stage."""
        return unwrapped(self.chunks[-1])

    def mixes_states(self, teacher: GPTModel) -> bool:
        """Return whether one projection of mixed hidden states gives the mix of both models' logits.

        It does where teacher and reference have the same output layer, and this layer is linear.
        """
        return teacher is self.last and nonlinear(teacher) is None

    @torch.no_grad()
    def entropy(self, states: Tensor, vocab: VocabShard) -> Tensor:
        """Return the reference's entropy [R], in nats and float64, at its ``states [R, 1, h]``.

        Collectives: those of `vocab_entropy` per ``chunk_tokens`` tokens.
        """
        parts = [
            vocab_entropy(project(self.last, chunk), vocab, backend=self.backend)
            for chunk in states.split(self.chunk_tokens)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def mix_into(self, teacher_logits: Tensor, states: Tensor, teacher_weights: Tensor | None = None) -> None:
        """Replace the teacher's logits t [R, v / tp] by (w t + r) / (1 + w), computed in float32 and rounded once.

        ``states [R, 1, h]``: the reference's states, which are projected to r ``chunk_tokens`` tokens at a time.
        ``teacher_weights [R]``: the w of each token; None is the target's.
        """
        for start in range(0, len(states), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            weight = self.target.teacher_weight if teacher_weights is None else teacher_weights[chunk]
            # No name keeps the logits of one chunk while the next one is projected.
            teacher_logits[chunk] = unit_mix(project(self.last, states[chunk]).float(), teacher_logits[chunk], weight)
