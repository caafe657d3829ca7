# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A norm over all heads is the formula in float64, with heads on one rank or on several, and so are its gradients."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)

from megatron_selfdistill.architectures.rare_layers import AllHeadsRMSNorm
from megatron_selfdistill.config import OptimizerConfig, ScheduleConfig
from megatron_selfdistill.model.architecture import transformer_config

HEADS, CHANNELS, EPS = 4, 6, 1e-3


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return x [s, b, heads, channels], the weight [heads * channels], and the gradient of the result."""
    generator = torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(5, 2, HEADS, CHANNELS, generator=generator) for _ in range(2))
    scales = torch.tensor([0.02, 0.1, 0.5, 1.0])[:, None]  # each head would be normalised otherwise
    return scales * x, 1 + 0.3 * torch.randn(HEADS * CHANNELS, generator=generator), upstream


def expected() -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and the gradients of x and of the weight, in float64."""
    x, weight, upstream = (tensor.double() for tensor in inputs())
    x, weight = x.requires_grad_(), weight.requires_grad_()
    flat = x.flatten(-2)
    out = (flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).view_as(x)
    out.backward(upstream)
    return out.detach(), x.grad, weight.grad


def computed(tp_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what this rank has of the result and of the gradients."""
    model, cuts = models.model_config(layernorm_epsilon=EPS), models.parallel(tp=tp_size)
    _, grid = models.build(model, cuts)
    config = transformer_config(model, cuts, OptimizerConfig(precision="fp32"), ScheduleConfig())
    norm = AllHeadsRMSNorm(config, HEADS, CHANNELS, grid.tp_group)
    x, weight, upstream = inputs()
    held = slice(grid.tp_rank * HEADS // tp_size, (grid.tp_rank + 1) * HEADS // tp_size)
    norm.weight.data.copy_(weight.view(HEADS, CHANNELS)[held].flatten())
    mine = x[..., held, :].clone().requires_grad_()
    out = norm(mine)
    out.backward(upstream[..., held, :])
    return out.detach(), mine.grad, norm.weight.grad


@pytest.mark.parametrize("tp_size", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_the_norm_and_its_gradients_equal_the_formula_in_every_layout(ranks, tp_size):
    parts = ranks.run(computed, tp_size, world_size=tp_size)
    for dim, exact, *held in zip((2, 2, 0), expected(), *parts, strict=True):
        torch.testing.assert_close(torch.cat(held, dim).double(), exact, rtol=1e-5, atol=1e-5)
