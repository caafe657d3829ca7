# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradients of hidden states and output weight from those of logits, one chunk of tokens after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.gathered_hidden import HiddenPlacement


class WeightGradient(Protocol):
    """A receiver of the output weight's gradient in one backward, in place of autograd."""

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add ``gradient^T hidden`` to the weight's gradient.

        hidden: [n, h]; gradient: [n, V / tp], the gradient of the logits; both contiguous.
        """

    def for_autograd(self) -> Tensor | None:
        """Return the tensor that autograd receives as the weight's gradient, once everything is added."""


class ProjectionGradients:
    """The gradients of hidden states (dgrad) and weight (wgrad) in one backward, summed over its chunks.

    student_hidden: a function that waits for the hidden states of all tokens, called from the first wgrad on; None
    where the weight needs no gradient.
    hidden: the tensor of hidden states that this rank holds.
    """

    def __init__(
        self,
        num_tokens: int,
        placement: HiddenPlacement,
        weight_gradient: WeightGradient | None,
        student_hidden: Callable[[], Tensor] | None,
        hidden: Tensor,
        weight: Tensor,
        needs_hidden: bool,
    ) -> None:
        self.placement, self.weight_gradient = placement, weight_gradient
        self.student_hidden, self.hidden, self.weight = student_hidden, hidden, weight
        self.dgrad = hidden.new_empty(num_tokens, hidden.shape[1]) if needs_hidden else None
        self.wgrad: Tensor | None = None
        self.reduced: Callable[[], Tensor] | None = None

    def add(self, tokens: slice, gradient: Tensor, scale: Tensor | None, last: bool) -> None:
        """Add the gradient of the logits of a chunk of tokens, which is only read.

        scale: [n, 1] float32, multiplied into tensors with h columns; None is 1.
        last: whether this is the last chunk: the sum over ranks then starts between its two GEMMs.
        """
        if self.dgrad is not None:
            torch.mm(gradient, self.weight, out=self.dgrad[tokens])
            if scale is not None:
                self.dgrad[tokens].mul_(scale)
            if last:
                self.reduced, self.dgrad = self.placement.start_reduce(self.dgrad, self.hidden), None
        if self.student_hidden is not None and len(gradient):
            chunk = self.student_hidden()[tokens]
            if scale is not None:
                chunk = torch.mul(chunk, scale, out=torch.empty_like(chunk))
            self._add_wgrad(chunk, gradient)

    def _add_wgrad(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add the weight's gradient of one chunk."""
        if self.weight_gradient is not None:
            self.weight_gradient.add(hidden.contiguous(), gradient)
            return
        product = gradient.t().mm(hidden)
        # float32 for several chunks: in bf16 each sum would round away what the earlier chunks have added.
        self.wgrad = product if self.wgrad is None else self.wgrad.float().add_(product)

    def of_hidden(self) -> Tensor | None:
        """Return the gradient of the hidden states that this rank holds, once the sum over ranks is done."""
        return self.reduced() if self.reduced is not None else None

    def of_weight(self) -> Tensor | None:
        """Return the weight's gradient for autograd; None where the weight needs none."""
        if self.student_hidden is None:
            return None
        if self.weight_gradient is not None:
            return self.weight_gradient.for_autograd()
        return torch.zeros_like(self.weight) if self.wgrad is None else self.wgrad.to(self.weight.dtype)
