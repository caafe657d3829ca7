# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers that stand in for Transformer Engine's compute what float64 written here computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.architectures import attention_variants
from megatron_selfdistill.architectures.attention_variants import VariantAttention, sink_channels
from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.model import context_parallel_attention, local_attention
from megatron_selfdistill.model.layers import RMSNorm
from megatron_selfdistill.model.local_attention import CoreAttention

HEADS, GROUPS, CHANNELS = 4, 2, 8
SINKS = (0.5, -2.0, 3.0, 1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window_size": (5, 0)},
    "sinks": {"softmax_type": "learnable"},
    "window and sinks": {"window_size": (5, 0), "softmax_type": "learnable"},
}
"""Kinds of attention -> the fields of ``TransformerConfig`` that choose them."""

# Sequences of very different lengths, each padded to a multiple of 2 * CP, and a segment that is only
# padding.
LENGTHS = [1, 3, 40, 17, 2, 8]
SEGMENTS = [4, 4, 40, 20, 4, 8, 12]
BOUNDS = [0, *torch.tensor(SEGMENTS).cumsum(0).tolist()]


ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
"""Stands in for a process group of one."""


def config(**changes) -> TransformerConfig:
    values = {"num_layers": 1, "hidden_size": HEADS * CHANNELS, "num_attention_heads": HEADS}
    values |= {
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**values | changes)


def attention(group=None, variant: str = "full", **kwargs) -> CoreAttention:
    collection, cls = SimpleNamespace(cp=group or ONE_RANK), VariantAttention if VARIANTS[variant] else CoreAttention
    made = cls(config(**VARIANTS[variant]), 1, None, "self", pg_collection=collection, **kwargs)
    with torch.no_grad():
        for sinks in made.parameters():
            sinks.copy_(torch.tensor(SINKS))
    return made


def reference(
    query: Tensor, key: Tensor, value: Tensor, variant: str = "full", sinks: Sequence[float] | Tensor = SINKS
) -> Tensor:
    """Return the causal attention of one sequence in float64: ``[s, n, d]``, ``[t, n_kv, d]`` -> ``[s, n * d]``.

    The queries are the last s of t positions.
    """
    fields = VARIANTS[variant]
    q, k, v = query.double(), key.double(), value.double()
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("ind,jnd->nij", q, k) / q.size(-1) ** 0.5
    positions = torch.arange(k.size(0))
    own = positions[k.size(0) - q.size(0) :, None]
    hidden = positions[None, :] > own
    if "window_size" in fields:
        hidden = hidden | (positions[None, :] < own - fields["window_size"][0])
    scores = scores.masked_fill(hidden, -torch.inf)
    if "softmax_type" in fields:
        columns = torch.as_tensor(sinks, dtype=torch.float64)[:, None, None].expand(-1, q.size(0), 1)
        scores = torch.cat([scores, columns], dim=-1)
    return torch.einsum("nij,jnd->ind", scores.softmax(-1)[..., : k.size(0)], v).flatten(1)


def random_qkv(*rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, heads, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return 3 * query, key, value  # peaked: each position looks at few others


# -- RMSNorm -----


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_and_its_gradients_equal_the_formula(zero_centered):
    norm = RMSNorm(config(layernorm_zero_centered_gamma=zero_centered), 24, eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
    x = (0.1 * torch.randn(5, 3, 24, generator=generator)).requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + zero_centered)
    upstream = torch.randn(5, 3, 24, generator=generator)
    expected.backward(upstream.double())
    norm(x).backward(upstream)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_bf16_rounds_only_the_normed_input_and_the_product():
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    norm = RMSNorm(config(params_dtype=torch.bfloat16, bf16=True), 24)
    assert norm.weight.dtype == torch.bfloat16
    norm.weight.data.copy_(torch.linspace(0.3, 1.7, 24))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).equal((exact.bfloat16().double() * norm.weight.double()).bfloat16())
    assert not norm(x).equal((exact * norm.weight.double()).bfloat16()), "or the order would not matter"


# -- attention, unpacked -----


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_with_grouped_queries_and_its_gradients_equal_the_formula(variant, monkeypatch):
    monkeypatch.setattr(attention_variants, "_LEAST_QUERIES", 1)  # blocks of 6 queries
    query, key, value = (x.requires_grad_() for x in random_qkv(13, 2))
    layer = attention(variant=variant)
    out = layer(query, key, value)
    assert out.shape == (13, 2, HEADS * CHANNELS)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    sinks = torch.tensor(SINKS, dtype=torch.float64, requires_grad=True)
    for b in range(2):
        q, k, v = (x[:, b].detach().double().requires_grad_() for x in (query, key, value))
        expected = reference(q, k, v, variant, sinks)
        expected.backward(upstream[:, b].double())
        torch.testing.assert_close(out[:, b].double(), expected, rtol=1e-5, atol=1e-5)
        for got, exact in ((query, q), (key, k), (value, v)):
            torch.testing.assert_close(got.grad[:, b].double(), exact.grad, rtol=1e-5, atol=1e-5)
    for parameter in layer.parameters():
        bound = 13 * 2 * GROUPS * CHANNELS * 2.0**-24  # the queries of two heads, and the channels of their scores
        torch.testing.assert_close(parameter.grad.double(), sinks.grad, rtol=1e-5, atol=bound)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_queries_against_a_cache_equal_the_last_rows_of_the_whole(variant):
    query, key, value = random_qkv(13, 2)
    for num_queries in (1, 4, 12, 13):
        out = attention(variant=variant)(query[-num_queries:], key, value)
        for b in range(2):
            expected = reference(query[-num_queries:, b], key[:, b], value[:, b], variant)
            torch.testing.assert_close(out[:, b].double(), expected, rtol=1e-5, atol=1e-5)
    hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)[None, None]  # of Megatron's kind: it changes nothing
    torch.testing.assert_close(attention(variant=variant)(query, key, value, attention_mask=hidden), out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_of_rows_with_unequal_lengths_places_each_query_at_its_last_column(variant):
    """In one decoding step, as `RaggedCache` gives the mask."""
    query, key, value = random_qkv(13, 3)
    columns = torch.tensor([12, 4, 8])
    hidden = (torch.arange(13) > columns[:, None])[:, None, None]
    out = attention(variant=variant)(query[:1], key, value, attention_mask=hidden)
    for b, column in enumerate(columns.tolist()):
        expected = reference(query[:1, b], key[: column + 1, b], value[: column + 1, b], variant)
        torch.testing.assert_close(out[:, b].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sink_of_zero_is_the_softmax_that_is_off_by_one():
    query, key, value = random_qkv(9, 1)
    one = SimpleNamespace(cp=ONE_RANK)
    layer = VariantAttention(config(softmax_type="off-by-one"), 1, None, "self", pg_collection=one)
    expected = reference(query[:, 0], key[:, 0], value[:, 0], "sinks", torch.zeros(HEADS))
    torch.testing.assert_close(layer(query, key, value)[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert not list(layer.parameters()) and not layer.state_dict()


def test_a_sink_in_bf16_keeps_its_precision_for_a_scale_that_bf16_rounds():
    sinks = torch.tensor([5.03125, -3.015625, 20.125, 0.0]).bfloat16()
    channels = sink_channels(sinks, 0.3, torch.zeros(1, HEADS, 2, CHANNELS).bfloat16())
    assert channels.dtype == torch.bfloat16 and channels.shape == (1, HEADS, 2, 8)
    scores = 0.3 * channels[0, :, 0].double().sum(-1)  # a kernel adds the products in float32
    torch.testing.assert_close(scores, sinks.double(), rtol=2**-15, atol=0)


def test_a_window_never_makes_the_scores_of_a_whole_sequence(monkeypatch):
    """Of 1024 tokens with a window of 16, in blocks of 64 queries."""
    monkeypatch.setattr(attention_variants, "_LEAST_QUERIES", 64)
    monkeypatch.setitem(VARIANTS, "long", {"window_size": (15, 0), "softmax_type": "learnable"})
    rows = [x.requires_grad_() for x in random_qkv(1024)]
    bounds = torch.tensor([0, 1024])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    seen = Largest()
    with seen, sdpa_kernel([SDPBackend.MATH]):
        attention(variant="long")(*rows, packed_seq_params=packed).sum().backward()
    assert seen.largest < 1024 * 1024 // 8


# -- attention, packed -----


def packed_params() -> PackedSeqParams:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def real_rows() -> Tensor:
    """Positions of the row that hold a token, not padding."""
    return torch.cat([torch.arange(s, s + n) for s, n in zip(BOUNDS, LENGTHS, strict=False)])


def packed_attention(group=None, variant: str = "full", fused: bool = True) -> list[Tensor]:
    """Output and gradients of query, key and value, at the positions that this rank of ``group`` holds, in blocks.

    The gradient of the sinks is the last entry, where there are sinks.  The default group is that of all ranks.
    """
    group = group or dist.group.WORLD
    held = context_parallel_positions(torch.tensor(BOUNDS), group.size(), group.rank())
    query, key, value = (x[held].clone().requires_grad_() for x in random_qkv(BOUNDS[-1]))
    upstream = torch.zeros(BOUNDS[-1], HEADS * CHANNELS)
    upstream[real_rows()] = torch.randn(len(real_rows()), HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if fused else [SDPBackend.MATH]
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(backends):
        patch.setattr(attention_variants, "_LEAST_QUERIES", 1)
        patch.setattr(context_parallel_attention, "_FUSED_QUERIES", 8)
        patch.setattr(context_parallel_attention, "_SCORES", 8 * HEADS * BOUNDS[-1])
        layer = attention(group, variant)
        out = layer(query, key, value, packed_seq_params=packed_params())
        out.backward(upstream[held])
    return [out.detach(), query.grad, key.grad, value.grad, *(p.grad for p in layer.parameters())]


def whole_row(per_rank: list[list[Tensor]]) -> list[Tensor]:
    """Return the tensors of the row, joined from the shares of the context-parallel ranks; add those of the sinks."""
    held = [context_parallel_positions(torch.tensor(BOUNDS), len(per_rank), r) for r in range(len(per_rank))]
    joined = []
    for parts in zip(*per_rank, strict=True):
        if parts[0].dim() == 1:
            joined.append(torch.stack(parts).sum(0))
            continue
        full = torch.full((BOUNDS[-1], *parts[0].shape[1:]), torch.nan)
        for positions, part in zip(held, parts, strict=True):
            full[positions] = part
        joined.append(full)
    return joined


def assert_each_sequence_is_as_if_alone(row: list[Tensor], variant: str = "full") -> None:
    sinks = torch.tensor(SINKS, dtype=torch.float64, requires_grad=True)
    query, key, value = random_qkv(BOUNDS[-1])
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(real_rows()), HEADS * CHANNELS, generator=generator).split(LENGTHS)
    for start, length, gradient in zip(BOUNDS, LENGTHS, upstream, strict=False):
        here = slice(start, start + length)
        q, k, v = (x[here].double().requires_grad_() for x in (query, key, value))
        expected = reference(q, k, v, variant, sinks)
        expected.backward(gradient.double())
        for got, exact in zip(row, (expected, q.grad, k.grad, v.grad), strict=False):
            torch.testing.assert_close(got[here].double(), exact, rtol=1e-5, atol=1e-5)
    assert len(row) == (5 if sinks.grad is not None else 4)
    if sinks.grad is not None:
        torch.testing.assert_close(row.pop().double(), sinks.grad, rtol=1e-5, atol=1e-5)
    padding = torch.ones(BOUNDS[-1], dtype=torch.bool).index_fill(0, real_rows(), False)
    assert row[0].isfinite().all()
    assert all(not gradient[padding].any() for gradient in row[1:]), "padding has a gradient"


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_equal_each_sequence_alone_also_cut_over_context_parallel_ranks(ranks, variant):
    assert_each_sequence_is_as_if_alone(whole_row([packed_attention(ONE_RANK, variant)]), variant)
    for fused in (True, False):
        per_rank = ranks.run(packed_attention, None, variant, fused, world_size=2)
        assert_each_sequence_is_as_if_alone(whole_row(per_rank), variant)


def test_segments_by_length_place_every_row_once_and_batch_like_with_like():
    for lengths in ([1], [5], [1] * 9, [64, 1, 63, 33, 32], [4, 0, 4]):
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        layout = local_attention.segments_by_length(bounds)
        rows = torch.cat([index.flatten() for index in layout.batches])
        assert rows[layout.place].equal(torch.arange(sum(lengths)))
        for index in layout.batches:
            own = [b - a for a, b in pairwise(bounds.tolist()) if a in index[:, 0] and b > a]
            assert max(own) <= 2 * min(own)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made
