# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLTF: what a model learns from the text of an environment beside the rewards, without the text in its prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.recipes.advantages import group_advantages
from megatron_selfdistill.recipes.signals import Signals


def revision_advantages(signals: Signals, baseline: str) -> Tensor:
    """Return [B]: the advantage of each response as an answer to the problem alone.

    ``baseline``: what is subtracted from the reward of the response: "first_turn" (the mean reward of the first turns
    of the group, R(y1) - mean_j R(y0_j): what the model achieves without the environment's text) or "same_turn" (the
    mean reward of the responses of the same turn).
    Source: RLTF-SD, Song et al. 2026 (arXiv 2602.02482); their formula is "first_turn", and their released code runs
    with "same_turn".
    """
    if baseline == "same_turn":
        return group_advantages(signals, "none", "turn", 0.0)
    assert signals.turns is not None, "an environment gives turns"
    first = (signals.turns == 0).to(signals.rewards)
    mean = signals.sum_per_group(signals.rewards * first) / signals.sum_per_group(first)
    return signals.rewards - mean[signals.groups]


def weight_at(step: int, weight: float, warmup_steps: int) -> float:
    """Return the weight of revisions in the step that ``step`` optimizer steps precede: weight min(1, step / warm-up).

    Source: RLTF-SD raises it linearly from 0 for mathematics.
    """
    return weight if step >= warmup_steps else weight * step / warmup_steps


def extra_likelihood(advantages: Tensor, is_revision: Tensor, *, revision_weight: float, reply_weight: float) -> Tensor:
    """Return [E]: the coefficient of -log p for the tokens of E texts that are trained on besides the responses.

    ``is_revision [E]``: whether the text is the last response of an episode after the problem alone, with the
    coefficient ``revision_weight`` times its advantage (`revision_advantages`); else the text is a reply of the
    environment after problem and response, with the coefficient ``reply_weight``.  No coefficient has a ratio p / mu,
    since the texts were written after other prompts.  ``advantages [E]`` float64.
    """
    return torch.where(is_revision, revision_weight * advantages, reply_weight)


def likelihood_floors(is_revision: Tensor, min_log_prob: float | None) -> Tensor:
    """Return [E] float64: the log-prob below which a token of each text is not trained on; minus infinity for none.

    Only revisions have a floor: a token that the model finds very unlikely without the environment's text teaches what
    the text gave away.
    """
    floor = -math.inf if min_log_prob is None else min_log_prob
    return torch.where(is_revision, floor, -math.inf).double()
