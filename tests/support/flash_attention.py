# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PyTorch's flash attention on a CPU, which has no kernel for it: the same operators by their formulas.

PyTorch's dispatcher calls these functions, so that a call must fit the operators' real schema, which has the types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Give the CPU PyTorch's operators of flash attention while the context is open."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def softmax_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: list[int], left: int | None) -> Tensor:
    """Return the definition, [t, n * d], in the dtype of its arguments: the sink is a further column of the scores.

    ``q [t, n, d]``, ``k`` and ``v [t, groups, d]``, ``sinks [n]``: packed sequences of these lengths; ``left``: how
    many earlier tokens a token sees, or None for all.
    """
    parts = []
    heads = q.size(1) // k.size(1)
    for queries, *of_groups in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(heads, dim=1) for x in of_groups)
        scores = torch.einsum("ind,jnd->nij", queries, keys) / q.size(-1) ** 0.5
        places = torch.arange(len(queries), device=q.device)
        distance = places[:, None] - places
        hidden = (distance < 0) if left is None else (distance < 0) | (distance > left)
        column = sinks[:, None, None].expand(-1, len(queries), 1)
        weights = torch.cat([scores.masked_fill(hidden, -torch.inf), column], dim=-1).softmax(-1)[..., :-1]
        parts.append(torch.einsum("nij,jnd->ind", weights, values).flatten(1))
    return torch.cat(parts)


def _check(query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int) -> None:
    """Raise RuntimeError where the CUDA kernel would; float64, which CUDA lacks, is here for exact comparisons."""
    expected = [
        (query.dtype in (torch.bfloat16, torch.float16, torch.float64), "FlashAttention only support fp16 and bf16"),
        (query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype"),
        (cum_q.dtype == cum_k.dtype == torch.int32, "cu_seqlens must have dtype int32"),
        (cum_q.is_contiguous() and cum_k.is_contiguous(), "cu_seqlens must be contiguous"),
        (all(x.stride(-1) == 1 for x in (query, key, value)), "Input tensor must have contiguous last dimension"),
        (query.size(-1) % 8 == 0 and query.size(-1) <= 256, "head_size must be a multiple of 8 and at most 256"),
        (query.size(1) % key.size(1) == 0, "Number of heads in key/value must divide number of heads in query"),
        (key.shape == value.shape and len(cum_q) == len(cum_k), "shapes"),
        (int(cum_q.diff().max()) <= max_q and int(cum_k.diff().max()) <= max_k, "the longest sequence"),
        (int(cum_q[-1]) == len(query) and int(cum_k[-1]) == len(key), "the number of tokens"),
    ]
    for holds, message in expected:
        if not holds:
            raise RuntimeError(message)


def _scores(query: Tensor, key: Tensor, scale: float, left: int) -> Tensor:
    """Return the scores [n, q, k] in float64; hidden ones are -inf.  The last query sees the last key."""
    heads = query.size(1) // key.size(1)
    scores = scale * torch.einsum("ind,jnd->nij", query.double(), key.double().repeat_interleave(heads, dim=1))
    own = torch.arange(len(key) - len(query), len(key))[:, None]
    keys = torch.arange(len(key))
    hidden = keys > own
    if left >= 0:
        hidden = hidden | (keys < own - left)
    return scores.masked_fill(hidden, -torch.inf)


def _forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **others):
    scale, window_size_left = others.pop("scale"), others.pop("window_size_left")
    assert others.pop("window_size_right") == dropout_p == 0 and is_causal and not return_debug_mask
    assert not any(value is not None for value in others.values())
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    out, lse = [], []
    for queries, keys in zip(pairwise(cum_seq_q.tolist()), pairwise(cum_seq_k.tolist()), strict=True):
        k, v = (x[slice(*keys)] for x in (key, value))
        scores = _scores(query[slice(*queries)], k, scale, window_size_left)
        lse.append(scores.logsumexp(-1))
        v = v.double().repeat_interleave(query.size(1) // v.size(1), dim=1)
        out.append(torch.einsum("nij,jnd->ind", scores.softmax(-1), v))
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    state, unused = (torch.empty(size, dtype=torch.uint64) for size in ((2,), ()))
    return torch.cat(out).to(query.dtype), torch.cat(lse, dim=1).to(precision), state, unused, query.new_empty(0)


def _backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, *how, **windows):
    """As the kernel: the probabilities from the log-sum-exp, and the mean of the gradient from the output."""
    dropout_p, is_causal, rng_state, unused = how
    scale, window_size_left = windows["scale"], windows["window_size_left"]
    assert is_causal and dropout_p == 0 and windows["window_size_right"] == 0
    assert rng_state.dtype == unused.dtype == torch.uint64
    assert out.dtype == grad_out.dtype == query.dtype and logsumexp.shape == (query.size(1), len(query))
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    heads = query.size(1) // key.size(1)
    for queries, keys in zip(pairwise(cum_seq_q.tolist()), pairwise(cum_seq_k.tolist()), strict=True):
        i, j = slice(*queries), slice(*keys)
        scores = _scores(query[i], key[j], scale, window_size_left)
        p = (scores - logsumexp[:, i, None].double()).exp()
        k, v = (x[j].double().repeat_interleave(heads, dim=1) for x in (key, value))
        dy = grad_out[i].double()
        mean = (dy * out[i].double()).sum(-1).t()[..., None]
        ds = p * (torch.einsum("ind,jnd->nij", dy, v) - mean)
        dv, dk = torch.einsum("nij,ind->jnd", p, dy), torch.einsum("nij,ind->jnd", ds, query[i].double()) * scale
        grads[0][i] = torch.einsum("nij,jnd->ind", ds, k) * scale
        for grad, of_heads in ((grads[1], dk), (grads[2], dv)):
            grad[j] = of_heads.unflatten(1, (-1, heads)).sum(2)
    return tuple(grad.to(query.dtype) for grad in grads)
