# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The terms that several methods share: the teacher's part with one weight, and the part of rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.sources.signals import Signals, Terms

EPSILON = 1e-6
"""The number added to the standard deviation of a group's rewards."""


def group_advantages(signals: Signals, std: str, credit: str = "episode", discount: float = 1.0) -> Tensor:
    """Return the advantage [B] of each response: its return minus the mean return of its group.

    ``credit``: what is compared.  With "episode", the return of a response is the sum of the rewards of its episode,
    and the mean is over the episodes of the group.  With "turn", the return is that of `discounted_returns`, and the
    mean is over the responses of the same turn in the group.  Both are the reward and the mean reward where every
    response is an episode.
    ``std``: what divides the difference: "sample" (the standard deviation with n - 1, plus `EPSILON`), "population"
    (with n, plus `EPSILON`) or "none".  A group whose returns are all equal has advantages of 0.
    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; without the division Dr. GRPO, Liu et al. 2025
    (arXiv 2503.20783).
    """
    if signals.episodes is None or signals.turns is None:
        return _centred(signals.rewards, signals.groups, std)
    if credit == "turn":
        _, same_turn = torch.stack([signals.groups, signals.turns]).unique(dim=1, return_inverse=True)
        return _centred(discounted_returns(signals, discount), same_turn, std)
    num_episodes = int(signals.episodes.max()) + 1 if len(signals.episodes) else 0
    totals = signals.rewards.new_zeros(num_episodes).index_add_(0, signals.episodes, signals.rewards)
    group = signals.groups.new_zeros(num_episodes).scatter_(0, signals.episodes, signals.groups)
    return _centred(totals, group, std)[signals.episodes]


def discounted_returns(signals: Signals, discount: float) -> Tensor:
    """Return [B]: the reward of each response plus ``discount`` times the return of the next turn of its episode."""
    if signals.episodes is None or signals.turns is None or not len(signals.turns):
        return signals.rewards
    returns = torch.zeros_like(signals.rewards)
    later = returns.new_zeros(int(signals.episodes.max()) + 1)
    for turn in range(int(signals.turns.max()), -1, -1):
        here = (signals.turns == turn).nonzero().squeeze(1)
        returns[here] = signals.rewards[here] + discount * later[signals.episodes[here]]
        later[signals.episodes[here]] = returns[here]
    return returns


def _centred(values: Tensor, groups: Tensor, std: str) -> Tensor:
    """Return ``values [n]`` minus the mean of their group, divided as `group_advantages` says."""
    size = int(groups.max()) + 1 if len(groups) else 0

    def sums(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(size).index_add_(0, groups, numbers)

    count = sums(torch.ones_like(values))
    difference = values - (sums(values) / count)[groups]
    if std == "none":
        return difference
    degrees = (count - 1 if std == "sample" else count).clamp(min=1)
    return difference / ((sums(difference**2) / degrees).sqrt()[groups] + EPSILON)


def uniform(signals: Signals, *, weight: float, signal: str) -> Terms:
    """Return ``weight`` for the tokens of all responses with a hint, and 0 for the others, as one of three signals.

    full: the divergence over the whole vocabulary.  sampled: its form for the sampled token, `Terms.sampled_kl`, which
    has the expectation of the reverse KL's gradient and more variance.  advantage: log q - log mu as an advantage, to
    which the clip applies (on-policy distillation as reinforcement learning).
    The second and third need `Signals.target_log_prob`.
    """
    like = signals.sampled_log_prob
    weights = weight * signals.per_token(signals.hinted.to(like))
    if signal == "full":
        return Terms.of(like, divergence=weights)
    if signal == "sampled":
        return Terms.of(like, sampled_kl=weights)
    assert signals.target_log_prob is not None, "the signal advantage needs a measuring pass"
    return Terms.of(like, advantage=weights * (signals.target_log_prob - like))


def weighted_advantages(signals: Signals, settings: Any) -> Tensor:
    """Return the advantage [B] of each response times the weight; ``settings``: those of `AdvantageSettings`."""
    advantages = group_advantages(signals, settings.advantage_std, settings.credit, settings.discount)
    return float(settings.weight) * advantages


def group_advantage(signals: Signals, settings: Any) -> Terms:
    """Return the terms of policy gradients: the advantage of a response for each of its tokens."""
    advantages = weighted_advantages(signals, settings)
    return Terms.of(signals.sampled_log_prob, advantage=signals.per_token(advantages))


def with_rewards(terms: Terms, signals: Signals, settings: Any) -> Terms:
    """Return ``terms`` plus those of `group_advantage`, where rewards have a weight."""
    return terms + group_advantage(signals, settings) if settings.weight > 0 else terms
