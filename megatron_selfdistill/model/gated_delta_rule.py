# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gated delta rule in PyTorch, in chunks of 64 tokens, and for one token.

Within a chunk, with c_t the sum of log a up to token t, the corrections u_t = b_t (v_t - k_t^T a_t S_{t-1}) satisfy

    u_t + sum_{r<t} b_t exp(c_t - c_r) (k_t^T k_r) u_r = b_t (v_t - exp(c_t) S_0^T k_t)

with the state S_0 before the chunk: one triangular system for all tokens of a chunk.  Source: Yang, Kautz and
Hatamizadeh 2024 (arXiv 2412.06464), section 3.3.

Megatron Core's ``torch_chunk_gated_delta_rule`` is the same function.  It substitutes row by row, and keeps a copy of
the system for each row until the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""The number of tokens whose corrections are solved together."""


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs ``[b, s, heads, d_v]`` in the dtype of ``query``, and the state behind the last token.

    ``query``, ``key`` ``[b, s, heads, d_k]`` of unit length, ``value [b, s, heads, d_v]``; ``g``, which is log a, and
    ``beta [b, s, heads]``; the states ``[b, heads, d_k, d_v]`` float32.  Everything is computed in float32.
    """
    s, (b, _, heads, d_k), d_v = key.size(1), key.shape, value.size(-1)
    q, k, v, log_decay, beta = (_in_chunks(x) for x in (query, key, value, g[..., None], beta[..., None]))
    q = q * d_k**-0.5
    decay = log_decay.cumsum(-2)  # of each token since the chunk's beginning, [b, heads, chunks, CHUNK, 1]
    between = (decay - decay.mT).tril().exp().tril()  # of the key's token until the query's
    system = (k * beta @ k.mT * between).tril(-1)
    sides = torch.cat([v * beta, k * beta * decay.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    without_state, of_state = solved.split([d_v, d_k], dim=-1)
    scores = q @ k.mT * between
    q, until_end = q * decay.exp(), k * (decay[..., -1:, :] - decay).exp()
    of_chunk = decay[..., -1:, :].exp()
    state = key.new_zeros(b, heads, d_k, d_v, dtype=torch.float32) if initial_state is None else initial_state
    out = []
    for i in range(q.size(2)):
        corrections = without_state[:, :, i] - of_state[:, :, i] @ state
        out.append(q[:, :, i] @ state + scores[:, :, i] @ corrections)
        state = state * of_chunk[:, :, i] + until_end[:, :, i].mT @ corrections
    outputs = torch.cat(out, dim=2)[:, :, :s].transpose(1, 2).to(query.dtype)
    return outputs, state if output_final_state else None


def one_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output ``[b, 1, heads, d_v]`` of one token and the state behind it, ``[b, heads, d_k, d_v]``.

    ``decay``, which is log a, and ``beta`` ``[b, 1, heads]``; ``state [b, heads, d_k, d_v]`` float32 is that before it.
    """
    q, k, v = (x[:, 0].float() for x in (query, key, value))
    state = state * decay[:, 0].exp()[..., None, None]
    correction = (v - torch.einsum("bhk,bhkv->bhv", k, state)) * beta[:, 0].float()[..., None]
    state = state + k[..., None] * correction[..., None, :]
    out = torch.einsum("bhk,bhkv->bhv", q * q.size(-1) ** -0.5, state)
    return out[:, None].to(query.dtype), state


def _in_chunks(x: Tensor) -> Tensor:
    """Return ``x [b, s, heads, d]`` as ``[b, heads, chunks, CHUNK, d]`` float32; zeros fill the last chunk."""
    padded = F.pad(x.transpose(1, 2).float(), (0, 0, 0, -x.size(1) % CHUNK))
    return padded.reshape(*padded.shape[:2], -1, CHUNK, padded.size(-1))
