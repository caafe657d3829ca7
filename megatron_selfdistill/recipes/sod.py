# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SOD: the teacher's log-ratio as an advantage, weaker in the turns where the student has drifted from the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms

EPSILON = 1e-6
"""The number added to both distances of a ratio."""


def sod(signals: Signals, *, weight: float, gain: float) -> Terms:
    """Return the teacher's advantage of SOD: ``weight * w_k * (log q - log mu)`` for the tokens of turn k.

    w_k: `turn_weights` of the turn's distance d_k, the mean of |log mu - log q| over its tokens.  The turns of an
    episode are the steps of the published method: the responses between the replies of the environment.  Responses
    without a hint have an advantage of 0.  Needs `Signals.target_log_prob`, `Signals.episodes` and `Signals.turns`.
    Source: SOD (arXiv 2605.07725) and its published code.
    """
    assert signals.target_log_prob is not None, "sod needs a measuring pass"
    log_ratio = signals.target_log_prob - signals.sampled_log_prob
    weights = weight * turn_weights(signals, signals.mean_per_sample(log_ratio.abs()), gain)
    weights = signals.per_token(torch.where(signals.hinted, weights, 0.0))
    advantage = torch.where(weights == 0, 0.0, weights * log_ratio)
    return Terms.of(signals.sampled_log_prob, advantage=advantage)


def turn_weights(signals: Signals, distances: Tensor, gain: float) -> Tensor:
    """Return the weight [B] of each response within its episode, from the ``distances [B]`` of the responses.

    The first turn of an episode has w_1 = 1, and turn k has w_k = min((d_1 + eps) / (d_k + eps), 1 + ``gain``) with
    eps = `EPSILON`.  This is the product of the ratios (d_u + eps) / (d_(u+1) + eps) of all earlier turns u, bounded
    once.  The first turn is the earliest one of the episode among the responses of the step.
    """
    assert signals.episodes is not None and signals.turns is not None, "sod needs episodes"
    turns, episodes = signals.turns, signals.episodes
    latest = turns.new_full((int(episodes.max()) + 1 if len(episodes) else 0,), torch.iinfo(turns.dtype).max)
    is_first = turns == latest.scatter_reduce(0, episodes, turns, "amin")[episodes]
    of_first = distances.new_zeros(len(latest)).index_add_(0, episodes, torch.where(is_first, distances, 0.0))
    ratio = (of_first[episodes] + EPSILON) / (distances + EPSILON)
    return torch.where(is_first, 1.0, ratio.clamp(max=1 + gain))
