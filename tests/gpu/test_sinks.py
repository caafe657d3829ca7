# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Attention with sinks by flash attention in bf16 equals its definition in float64, with all gradients.

A CPU has no kernel of flash attention; there the operators are those of tests/support/flash_attention.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import flash_attention
import pytest
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.architectures.flash_sinks import FlashSinkAttention

GPT_OSS, SMALL = (64, 8, 64), (4, 2, 8)
"""The heads, the query groups and the channels of gpt-oss-120b, and of a model for a CPU."""
BOUND = 3.0
"""The bound of errors relative to those of flash attention without sinks, which rounds the output once less."""
SINK_BOUND = 0.05
"""The bound of the relative error of the sinks' gradient, a sum over all tokens of products that bf16 rounds."""


@pytest.mark.smoke
@pytest.mark.parametrize("left", [None, 127], ids=["full", "window"])
def test_attention_with_sinks_is_as_near_to_float64_as_attention_without(child, keeps, left):
    with_sinks, without = child(errors, left)
    for i, name in enumerate(("output", "gradient of queries", "gradient of keys", "gradient of values")):
        keeps(f"{name}: error / that without sinks", with_sinks[i] / without[i], BOUND)
    keeps("gradient of sinks: relative error", with_sinks[4], SINK_BOUND)


def errors(rank: int, left: int | None) -> list[list[float]]:
    """Return the relative errors of the output and of all gradients, with sinks and without."""
    on_gpu = torch.cuda.is_available()
    heads, groups, channels = GPT_OSS if on_gpu else SMALL
    lengths = [1, 700, 129, 900, 40] if on_gpu else [1, 150, 9]
    device = torch.device("cuda" if on_gpu else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    rows = (heads, groups, groups, heads)
    q, k, v, dy = (torch.randn(sum(lengths), n, channels, generator=generator, device=device) for n in rows)
    inputs = [x.bfloat16() for x in (2 * q, k, v, dy.flatten(1))]
    found = []
    with nullcontext() if on_gpu else flash_attention.on_cpu():
        for sinks in (torch.linspace(-3, 6, heads, device=device).bfloat16(), q.new_full((heads,), -torch.inf)):
            got, expected = by_flash_attention(inputs, sinks, lengths, left), exact(inputs, sinks, lengths, left)
            found.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)])
    return found


def by_flash_attention(inputs: list[Tensor], sinks: Tensor, lengths: list[int], left: int | None) -> list[Tensor]:
    """Return the output and the gradients of queries, keys, values and sinks."""
    *leaves, dy = (x.clone().requires_grad_() for x in inputs)
    (_, heads, channels), groups = leaves[0].shape, leaves[1].size(1)
    sizes = {"hidden_size": heads * channels, "num_query_groups": groups, "kv_channels": channels}
    window = {"window_size": None if left is None else (left, 0), "attention_dropout": 0.0}
    config = TransformerConfig(num_layers=1, num_attention_heads=heads, softmax_type="learnable", **sizes, **window)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    layer = FlashSinkAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=one))
    layer.softmax_offset.data = sinks
    bounds = torch.tensor([0, *lengths], device=sinks.device).cumsum(0).int()
    longest = max(lengths)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    out = layer(*leaves, packed_seq_params=packed)
    out.backward(dy)
    return [out.detach(), *(leaf.grad for leaf in leaves), layer.softmax_offset.grad]


def exact(inputs: list[Tensor], sinks: Tensor, lengths: list[int], left: int | None) -> list[Tensor]:
    """Return what `by_flash_attention` returns, by the definition in float64."""
    *leaves, dy = (x.double().requires_grad_() for x in inputs)
    offset = sinks.double().requires_grad_()
    out = flash_attention.softmax_with_sinks(*leaves, offset, lengths, left)
    out.backward(dy)
    return [out.detach(), *(leaf.grad for leaf in leaves), offset.grad]
