# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stand-ins for two functions of flash-linear-attention: the same demands, computed token by token.

The arguments are those of fla-core 0.5.2 and 0.6.0 that this project gives.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

calls: list[dict[str, Any]] = []
"""The arguments of each call that state segments."""


def causal_conv1d(
    x: Tensor, weight: Tensor, *, activation=None, cu_seqlens=None, cu_seqlens_cpu=None
) -> tuple[Tensor, None]:
    """Return the convolution of ``x [b, t, d]`` with ``weight [d, w]``, in which each sequence begins with zeros."""
    assert weight.shape[0] == x.shape[2] and weight.dim() == 2
    assert activation in (None, "swish", "silu")
    out = []
    for row in _sequences(x, cu_seqlens, cu_seqlens_cpu):
        padded = F.pad(row, (0, 0, weight.shape[1] - 1, 0))
        taps = [padded[i : i + len(row)] * weight[:, i] for i in range(weight.shape[1])]
        out.append(torch.stack(taps).sum(0))
    y = _joined(out, x, cu_seqlens)
    return F.silu(y) if activation else y, None


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, cu_seqlens=None, cu_seqlens_cpu=None, **state: Any
) -> tuple[Tensor, None]:
    """Return the outputs ``[b, t, h, d_v]`` of the recurrence, whose state is zero where a sequence begins."""
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3] == g.shape == beta.shape
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    assert not any(state.values()) and state.keys() <= {"initial_state", "output_final_state"}
    scale = q.shape[-1] ** -0.5
    out = []
    for rows in zip(*(_sequences(x, cu_seqlens, cu_seqlens_cpu) for x in (q, k, v, g, beta)), strict=True):
        state = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
        tokens = []
        for q_t, k_t, v_t, g_t, beta_t in zip(*rows, strict=True):
            state = state * g_t.exp()[:, None, None]
            written = (v_t - torch.einsum("hk,hkv->hv", k_t, state)) * beta_t[:, None]
            state = state + k_t[:, :, None] * written[:, None]
            tokens.append(torch.einsum("hk,hkv->hv", q_t * scale, state))
        out.append(torch.stack(tokens))
    return _joined(out, v, cu_seqlens), None


def _sequences(x: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> list[Tensor]:
    """Return the sequences of ``x [b, t, ...]``: its rows, or the segments of its only row."""
    if cu_seqlens is None:
        assert cu_seqlens_cpu is None
        return list(x)
    assert x.shape[0] == 1  # the library raises ValueError for several rows
    assert cu_seqlens.dtype == torch.int64 and cu_seqlens.device == x.device and cu_seqlens.dim() == 1
    assert cu_seqlens_cpu is not None and cu_seqlens_cpu.device.type == "cpu" and cu_seqlens_cpu.equal(cu_seqlens.cpu())
    bounds = cu_seqlens_cpu.tolist()
    assert bounds[0] == 0 and bounds[-1] == x.shape[1] and all(start < end for start, end in pairwise(bounds))
    calls.append({"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens_cpu})
    return [x[0, start:end] for start, end in pairwise(bounds)]


def _joined(out: list[Tensor], like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return (torch.stack(out) if cu_seqlens is None else torch.cat(out)[None]).to(like.dtype)
