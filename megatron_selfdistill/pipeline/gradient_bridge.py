# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The link between a forward pass without gradients and the backward pass that the pipeline schedule expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradientBridge(torch.autograd.Function):
    """A value computed under ``no_grad``, with an autograd edge to ``edge`` that carries a zero gradient.

    Autograd, and so the schedule, treats a teacher microbatch like any other.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, edge: Tensor) -> Tensor:
        """Return ``value``."""
        ctx.edge = edge.shape, edge.dtype, edge.device
        return value.detach()  # it has no `_base`, so the schedule may deallocate it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return no gradient for the value, and zeros for the edge."""
        shape, dtype, device = ctx.edge
        return None, torch.zeros(shape, dtype=dtype, device=device)
