# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The numbers of response tokens that the loss does not need, and that only some steps measure.

They need the logits of student, target and reference at the same time.  After the loss of a student microbatch, the
last stage projects the hidden states of all three once more, a few tokens at a time; the loss and its gradient do not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.rare_mass import mass_on_rare
from megatron_selfdistill.loss.sharded.vocab_entropy import vocab_entropy
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target

CHUNK_TOKENS = 512
"""The largest number of tokens whose logits, of up to three models, exist at a time."""


@dataclass(frozen=True)
class TokenMeasures:
    """The measures of R response tokens, [R] float64 each, equal on all tensor-parallel ranks."""

    mass_on_rare_student: Tensor
    """The target's mass on tokens that are rare for the student, see `mass_on_rare`."""
    mass_on_rare_reference: Tensor | None
    """The same for the reference; None without a reference."""
    reference_entropy: Tensor | None
    """The entropy of the reference in nats; None without a reference, and where the loss takes it anyway."""

    @classmethod
    def concatenate(cls, parts: Sequence[TokenMeasures]) -> TokenMeasures:
        """Return the measures of the tokens of all parts, at least one, in their order."""
        return cls(
            torch.cat([part.mass_on_rare_student for part in parts]),
            _joined(part.mass_on_rare_reference for part in parts),
            _joined(part.reference_entropy for part in parts),
        )


@dataclass(frozen=True)
class TokenMeasurement:
    """The choice of what a step measures."""

    target: Target
    """The target of the step's loss, which has a teacher."""
    chunk_tokens: int = CHUNK_TOKENS
    """The largest number of tokens whose logits exist at a time."""
    backend: str | None = None
    """The backend that computes the reference's entropy, as for `distillation_loss`."""

    @torch.no_grad()
    def measures(
        self,
        beta: Tensor,
        logits_of: Callable[[slice], Sequence[Tensor]],
        vocab: VocabShard,
        teacher_weights: Tensor | None = None,
    ) -> TokenMeasures:
        """Return the measures of R tokens.

        ``beta [R]``: `TokenStats.beta`.  ``logits_of(tokens)``: the logits ``[n, v / tp]`` of a slice of the tokens, of
        the student, of the teacher (with a reference of the mix, as `distillation_loss` takes it), and of the reference
        where the target has one.  ``teacher_weights [R]``: the w of each token; None is the target's.
        Collectives over TP, per chunk of tokens: those of ``logits_of``, `mass_on_rare` and `vocab_entropy`.
        """
        parts = []
        step = max(1, min(self.chunk_tokens, CHUNK_TOKENS))
        for start in range(0, max(len(beta), 1), step):
            tokens = slice(start, min(start + step, len(beta)))
            student, teacher, *rest = logits_of(tokens)
            reference = rest[0] if self.target.is_anchored else None
            masses = mass_on_rare(
                student,
                teacher,
                beta[tokens],
                target=self.target,
                vocab=vocab,
                reference_logits=reference,
                teacher_weights=None if teacher_weights is None else teacher_weights[tokens],
            ).unbind(1)
            entropy = None
            if reference is not None and not self.target.needs_reference_entropy:
                entropy = vocab_entropy(reference, vocab, backend=self.backend)
            parts.append(TokenMeasures(masses[0], None if reference is None else masses[1], entropy))
        return TokenMeasures.concatenate(parts)


def _joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Return the concatenation of the parts, which are all tensors or all None."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None
