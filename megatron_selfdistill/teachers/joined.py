# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Teachers that have read the responses of a batch in schedules of their own, as one teacher of the student's schedule.

The product's logits are ``sum of s_i W_i h_i`` over the teachers i, with the share s_i of the token: up to a
constant per token, the weighted mean of their log-probs.  It is one teacher whose hidden states ``s_i h_i`` stand
side by side, with an output layer whose columns do.  If a teacher has a weight w_i of its own, the mix with the
reference is ``sum of s_i w_i l_i + r``: a product of the shares s_i w_i / w with the weight w = sum of s_i w_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.pipeline.batch import DeviceBatch
from megatron_selfdistill.pipeline.schedule import TeacherHiddenStates


@dataclass(frozen=True)
class JoinedTeachers:
    """One teacher or more that have read the responses of a batch before; their product teaches the tokens."""

    of_each: Sequence[TeacherHiddenStates]
    """The states of each teacher, in the order of the names."""
    shares: Tensor
    """The share of each teacher for each of ``PackedBatch.response_tokens``, [R_total, n], on the device."""
    weights: Tensor | None
    """The w of each of these tokens, [R_total] float64, on the device; None if all have that of the target."""
    output_weight: Tensor | None
    """The output weights of all teachers, ``[v / tp, sum of h_i]``; None on stages before the last.  The columns have
    the order of the states of all tensor-parallel ranks: the first slice of the width of every teacher, then the next.
    """
    chunks: Sequence[torch.nn.Module] = ()
    """No chunks: these teachers have no microbatch in the student's schedule."""

    @property
    def output(self) -> Tensor:
        """The output weights, on the last stage."""
        assert self.output_weight is not None, "the last stage has the output layers"
        return self.output_weight

    def states(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> JoinedHiddenStates:
        """Return the states of all teachers side by side."""
        return JoinedHiddenStates(batch, grid, hidden_size, store_bytes, self)

    def token_weights(self, response_ids: Tensor) -> Tensor | None:
        """Return the w of each of these tokens; None if all tokens have that of the target."""
        return None if self.weights is None else self.weights[response_ids]

    def after_last_pass(self) -> None:
        """Do nothing: the teachers make no pass in the student's schedule."""


class JoinedHiddenStates(TeacherHiddenStates):
    """The states of all teachers side by side, ``[R_j, sum of h_i / tp]``, scaled by the shares of the tokens.

    They are rounded to their dtype, and put together when they are taken.  ``store_bytes`` includes what the teachers'
    own states take.
    """

    def __init__(
        self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float, joined: JoinedTeachers
    ) -> None:
        super().__init__(batch, grid, hidden_size, store_bytes - sum(one.bytes_on_device for one in joined.of_each))
        self.joined = joined

    def take_field(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        """Return the joined states of a microbatch as the teacher's, and other fields as they were kept."""
        if name != "teacher":
            return super().take_field(index, name, dtype)
        shares = self.joined.shares[self.batch.student[index].response_ids].unbind(1)
        taken = [states.take_field(index, name, dtype) for states in self.joined.of_each]
        return torch.cat([(share[:, None] * part).to(dtype) for share, part in zip(shares, taken, strict=True)], 1)
