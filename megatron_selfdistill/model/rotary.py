# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rotary embedding without a fused kernel: one table of cosines and sines per pass, four operations per rotation.

Megatron's unfused functions compute the cosines and sines again for the queries and keys of every layer, and for packed
sequences they read the lengths back from the device.  The import of this module replaces both functions.  The new ones
round as Megatron's do, so that values and gradients have the same bits:

    x * cos + rotate_half(x) * sin  =  x * cos + swapped(x) * signed_sin

*swapped* exchanges the two channels of each pair, and *signed_sin* has the sign that ``rotate_half`` gives to the first
channel.  Positions that are known on the device (`know_positions`) choose the rows of the table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core.models.common.embeddings import rope_utils

_POSITIONS = "rotary_positions"
_megatrons_packed_rotation = rope_utils._apply_rotary_pos_emb_thd


def know_positions(cu_seqlens: Tensor, positions: Tensor | None) -> None:
    """Attach ``positions [s / cp]`` int64, one for each token of this rank, to the bounds of a packed sequence.

    Megatron passes only ``cu_seqlens`` to the rotary embedding.
    """
    setattr(cu_seqlens, _POSITIONS, positions)


@functools.lru_cache(maxsize=1)
def angles_at(freqs: Tensor, positions: Tensor) -> Tensor:
    """Return the rows ``positions [s]`` of ``freqs [num_positions, 1, 1, d]``, as ``[s, 1, 1, d]``.

    The result is the same object for all layers of a pass, which ask with the same two tensors.
    """
    return freqs.index_select(0, positions)


@functools.lru_cache(maxsize=1)
def cos_and_signed_sin(freqs: Tensor, dtype: torch.dtype, interleaved: bool, mscale: float) -> tuple[Tensor, Tensor]:
    """Return ``mscale`` times the cosines and the signed sines of ``freqs [..., d]``, both ``[..., d]`` in ``dtype``.

    ``interleaved``: whether a pair has the channels 2 i and 2 i + 1, or else i and i + d / 2.  The last result is kept,
    since all layers of a pass ask with the same tensor.
    """
    cos, sin = ((of(freqs) * mscale).to(dtype) for of in (torch.cos, torch.sin))
    first = sin[..., 0::2] if interleaved else sin[..., : sin.size(-1) // 2]
    first.neg_()
    return cos, sin


def rotated(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Return ``t [s, b, n, channels]`` with the rotary embedding of the angles ``freqs [s, 1 or b, 1, d]``.

    The first d channels turn, and the others stay as they are.  With ``mla_rotary_interleaved`` the pairs of ``t`` are
    the channels 2 i and 2 i + 1, and the result has the first channels of all pairs before the second channels.
    """
    width = freqs.size(-1)
    turning = t[..., :width]
    if mla_rotary_interleaved:
        turning = turning.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    cos, signed_sin = cos_and_signed_sin(freqs, t.dtype, rotary_interleaved, mscale)
    if rotary_interleaved:
        swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = turning.roll(width // 2, -1)
    turned = (turning * cos).add_(swapped.mul_(signed_sin))
    return turned if width == t.size(-1) else torch.cat((turned, t[..., width:]), dim=-1)


def forget_tables() -> None:
    """Forget the last table: a CUDA graph must compute the one that it reads, and nothing else may read that one."""
    angles_at.cache_clear()
    cos_and_signed_sin.cache_clear()


def _rotated_packed(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Return ``t [s / cp, n, d]`` with the rotary embedding of ``freqs [max_seqlen, 1, 1, d]`` at each position.

    Without known positions, call Megatron's own function, which waits for the device.  In a segment of padding all
    positions are 0, while Megatron's function counts them.
    """
    positions = getattr(cu_seqlens, _POSITIONS, None)
    if positions is None:
        result: Tensor = _megatrons_packed_rotation(
            t, cu_seqlens, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, cp_group=cp_group
        )
        return result
    angles = angles_at(freqs, positions)
    return rotated(t.unsqueeze(1), angles, rotary_interleaved, mla_rotary_interleaved, mscale).squeeze(1)


rope_utils._apply_rotary_pos_emb_bshd = older_megatron.with_older_keyword(rotated)
rope_utils._apply_rotary_pos_emb_thd = older_megatron.with_older_keyword(_rotated_packed)
