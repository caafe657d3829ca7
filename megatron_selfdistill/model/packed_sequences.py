# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parameters of a packed sequence with everything that layers would otherwise read back from the device.

Megatron's unfused rotary embedding reads the lengths of the sequences back from the device in every layer, for queries
and keys.  The import of this module replaces that function; the new one reads the positions of a `PackedSequences` on
the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_selfdistill.data.packing import Microbatch
from megatron_selfdistill.model.layers import SegmentBatches, segments_by_length

_POSITIONS = "rotary_positions"
_megatrons_rotary_embedding = rope_utils._apply_rotary_pos_emb_thd


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters of a packed sequence, with the values that layers would otherwise read from the device."""

    segment_bounds: tuple[int, ...] = ()
    """The values of ``cu_seqlens_q`` as Python integers."""
    rotary_positions: Tensor | None = None
    """The position in its sequence of each token that this context-parallel rank holds, [s / cp] int64."""
    segment_batches: SegmentBatches | None = None
    """The batches of segments for layers that compute with PyTorch; None under context parallelism or other layers."""

    def __post_init__(self) -> None:
        # Megatron passes only this tensor to the rotary embedding.
        setattr(self.cu_seqlens_q_padded, _POSITIONS, self.rotary_positions)

    @functools.cached_property
    def lengths_for_fla(self) -> dict[str, Tensor]:
        """The arguments that state the segments to flash-linear-attention: int64 on the device, and on the host.

        All layers get the same two objects: the library knows its tables of segments by the identity of both.
        """
        return {
            "cu_seqlens": self.cu_seqlens_q.long(),
            "cu_seqlens_cpu": torch.tensor(self.segment_bounds, dtype=torch.int64),
        }

    @classmethod
    def of(cls, microbatch: Microbatch, position_ids: Tensor, *, with_segment_batches: bool) -> PackedSequences:
        """Return the parameters of ``microbatch``, all tensors on the host.

        ``position_ids [s / cp]``: the positions of the tokens that this context-parallel rank holds.
        """
        cu_seqlens, longest = microbatch.cu_seqlens, microbatch.max_seqlen
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,  # causal attention ignores the padding behind a sequence
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            segment_bounds=tuple(cu_seqlens.tolist()),
            rotary_positions=position_ids,
            segment_batches=segments_by_length(cu_seqlens.long()) if with_segment_batches else None,
        )


def _rotary_embedding(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Return ``t [s / cp, n, d]`` with the rotary embedding of ``freqs [max_seqlen, 1, 1, d]`` at each position.

    Without known positions, call Megatron's own function, which waits for the device.  In a segment of padding all
    positions are 0, while Megatron's function counts them.
    """
    positions = getattr(cu_seqlens, _POSITIONS, None)
    if positions is None:
        rotated: Tensor = _megatrons_rotary_embedding(
            t, cu_seqlens, freqs, rotary_interleaved, multi_latent_attention, mscale, cp_group
        )
        return rotated
    rotated = rope_utils._apply_rotary_pos_emb_bshd(
        t.unsqueeze(1),
        freqs.index_select(0, positions),
        rotary_interleaved=rotary_interleaved,
        multi_latent_attention=multi_latent_attention,
        mscale=mscale,
    ).squeeze(1)
    return rotated


rope_utils._apply_rotary_pos_emb_thd = _rotary_embedding
