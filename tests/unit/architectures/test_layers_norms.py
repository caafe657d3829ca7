# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A norm over all heads is the formula in float64, with heads on one rank or on several, and so are its gradients."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)

from megatron_selfdistill.architectures.rare_layers import AllHeadsNormAttention, AllHeadsRMSNorm
from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.forward import unwrapped

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


def norm_of(tp_size: int, precision: str, **changes: float) -> tuple[AllHeadsRMSNorm, Any]:
    model, cuts = models.model_config(**changes), models.parallel(tp=tp_size)
    _, grid = models.build(models.model_config(), cuts)
    config = transformer_config(model, cuts, OptimizerConfig(precision=precision), ScheduleConfig())
    return AllHeadsRMSNorm(config, HEADS, CHANNELS, grid.tp_group), grid


def computed(tp_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what this rank has of the result and of the gradients."""
    norm, grid = norm_of(tp_size, "fp32", layernorm_epsilon=EPS)
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


def rounded() -> tuple[Tensor, Tensor]:
    norm, _ = norm_of(1, "bf16")
    x, weight, _ = (tensor.bfloat16() for tensor in inputs())
    norm.weight.data.copy_(weight)
    exact = x.double() / (x.double().square().mean((-2, -1), keepdim=True) + 1e-5).sqrt()
    return norm(x).detach(), (exact.bfloat16().double() * weight.view(HEADS, CHANNELS).double()).bfloat16()


def test_the_norm_of_bf16_rounds_only_the_normed_input_and_the_product(ranks):
    ((found, exact),) = ranks.run(rounded, world_size=1)
    assert found.equal(exact)


def attention_of(cuts: ParallelConfig) -> Tensor:
    """Check the layer and its marks; return the whole weight."""
    chunks, grid = models.build(models.model_config(qk_layernorm_all_heads=True), cuts)
    attention = unwrapped(chunks[0]).decoder.layers[0].self_attention
    weight = attention.k_layernorm.weight
    assert type(attention) is AllHeadsNormAttention and weight.tensor_model_parallel
    assert not getattr(weight, "sequence_parallel", False) and not attention.config.qk_layernorm, "it would be summed"
    shard = attention.sharded_state_dict("attention.")["attention.k_layernorm.weight"]
    assert tuple(shard.global_shape) == (16,)  # 2 groups of 8 channels
    gathered = [torch.empty_like(weight) for _ in range(grid.tp_size)]
    dist.all_gather(gathered, weight.detach(), group=grid.tp_group)
    return torch.cat(gathered)


def test_the_weights_are_cut_like_the_heads_and_no_gradient_of_them_is_summed(ranks):
    cut = ranks.run(attention_of, models.parallel(tp=2, sp=True), world_size=2)
    (whole,) = ranks.run(attention_of, models.parallel(), world_size=1)
    assert all(full.equal(whole) for full in cut)
