# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The partial batches of a step: several calls of the schedule, whose gradients add up to those of one call.

The weights change only after the last partial batch, so a response may be trained on while others are still being
generated.  The loss of a step is a sum over response tokens, divided by their number N, which is known once the last
partial batch begins.  Earlier partial batches divide by an estimate N' and leave their gradients on the rank that
computed them; before the last partial batch begins, these gradients are multiplied by N' / N.  The last partial batch
divides by N, and Megatron Core then reduces and finalises all gradients at once, as in a step of one partial batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accumulated:
    """The gradients in ``main_grad`` that the partial batches of a step have left so far; equal on all ranks."""

    num_response_tokens: int
    """Number of response tokens of these partial batches, over the global batch."""
    divisor: int
    """Number N' by which the sum of their losses is divided."""
    first_tokens: int
    """Number of response tokens of the first partial batch, over the global batch."""
    first_microbatches: int
    """Number of student microbatches with a response token in the first partial batch, over the global batch."""


@dataclass(frozen=True)
class PartialBatch:
    """The place of a partial batch in its step; the default is a step of one partial batch."""

    earlier: Accumulated | None = None
    """The gradients of the earlier partial batches; None in the first partial batch."""
    share: float = 1.0
    """An estimate of the share of the step's response tokens that are in the partial batches up to this one.  The first
    partial batch of several uses it; the gradient of the step does not depend on it."""
    is_last: bool = True
    """Whether the step ends with this partial batch."""
    next_teacher: str = ""
    """The name of the teacher whose weights the next partial batch probably needs; "" if none is known."""

    @property
    def is_whole(self) -> bool:
        """Whether the step has no other partial batch."""
        return self.earlier is None and self.is_last

    def accumulated(self, num_response_tokens: int, num_microbatches: int) -> Accumulated:
        """Return the gradients of the step up to this partial batch, whose numbers are counted before it runs.

        ``num_response_tokens``, ``num_microbatches``: the response tokens of this partial batch, and its student
        microbatches with a response token, over the global batch.
        """
        earlier = self.earlier or Accumulated(0, 0, num_response_tokens, max(num_microbatches, 1))
        total = earlier.num_response_tokens + num_response_tokens
        divisor = total if self.is_last else earlier.divisor or max(1, round(num_response_tokens / self.share))
        return Accumulated(total, divisor, earlier.first_tokens, earlier.first_microbatches)
