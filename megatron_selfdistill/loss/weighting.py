# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Weights of response tokens in the loss, from what is known about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TruncatedImportance:
    """``min(p / mu, cap)`` per token: p the student's probability of the token at temperature 1, mu that under the
    distribution which it was drawn from.

    mu differs from p where another engine sampled with other kernels, where a temperature or a cut changed the
    distribution, and where the response was guided.  The weight is a constant: no gradient flows through it.
    Source: truncated importance sampling, Ionides 2008 (doi 10.1198/106186008X320456); per token, as in Espeholt et al.
    2018 (arXiv 1802.01561), equation 1.
    """

    sampled_log_probs: Tensor
    """[R_total] nats: log mu of every response token of this replica, in the order of
    ``PackedBatch.response_tokens``; on the device of the logits, so that no microbatch waits for a copy of it."""
    cap: float = 2.0

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Tensor:
        """Weights [R] of the rows that predict ``response_ids`` [R], whose log p is ``student_log_prob`` [R]."""
        sampled = self.sampled_log_probs[response_ids].to(student_log_prob)
        with torch.no_grad():
            return (student_log_prob - sampled).exp().clamp(max=self.cap)


@dataclass(frozen=True)
class LikelyTurns:
    """One weight for all tokens of a logged turn: 1 where the student could have written it, else what ``weight`` says.

    With m the mean log p per token of a turn under the student at temperature 1, in the forward pass of the step itself
    (no pass of its own, and always the present weights): 1 where m >= ``min_log_prob``, else ``weight(m -
    min_log_prob)``.  Other tokens' weights and the number of tokens that divides the loss stay as they are, so a turn
    that is left out makes the step smaller, not the others larger.  The weight is a constant: no gradient flows through
    it.
    """

    turn_ids: Tensor
    """[R_total] int64: the turn of every response token of this replica, counted from 0, in the order of
    ``PackedBatch.response_tokens``; on the device of the logits.  A turn's tokens lie in one microbatch."""
    num_turns: int
    min_log_prob: float
    """Nats per token."""
    weight: Callable[[Tensor], Tensor]
    """`dropped` or `down_weighted`: of m - min_log_prob < 0."""
    over_ranks: Callable[[Tensor], Tensor]
    """The sum over the ranks that hold tokens of the same turns, with the same bits on all of them, so that none of
    them decides otherwise."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Tensor:
        """Weights [R] of the rows that predict ``response_ids`` [R], whose log p is ``student_log_prob`` [R]."""
        with torch.no_grad():
            turns = self.turn_ids[response_ids]
            sums = torch.zeros(2, self.num_turns, dtype=torch.float64, device=student_log_prob.device)
            sums[0].index_add_(0, turns, student_log_prob.double())
            sums[1].index_add_(0, turns, torch.ones_like(student_log_prob, dtype=torch.float64))
            log_prob, count = self.over_ranks(sums)
            excess = log_prob / count.clamp(min=1) - self.min_log_prob
            weights = torch.where(excess < 0, self.weight(excess), torch.ones_like(excess))
            return weights[turns].to(student_log_prob)


def dropped(excess: Tensor) -> Tensor:
    """0."""
    return torch.zeros_like(excess)


def down_weighted(excess: Tensor) -> Tensor:
    """exp(excess): the geometric mean of the tokens' probabilities, over that of the threshold."""
    return excess.exp()
