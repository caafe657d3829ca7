# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Advantages from the rewards of a group, and the clip of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms

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


def group_advantage(
    signals: Signals, *, weight: float, std: str, credit: str = "episode", discount: float = 1.0
) -> Terms:
    """Return the terms of policy gradients: the advantage of a response (`group_advantages`) for each of its tokens."""
    advantages = weight * group_advantages(signals, std, credit, discount)
    return Terms.of(signals.sampled_log_prob, advantage=signals.per_token(advantages))


def reward_advantage(signals: Signals, *, weight: float) -> Terms:
    """Return the terms of policy gradients whose advantage is the reward itself, for each token of its response.

    Source: OpenClaw-RL (arXiv 2603.10165), where every turn has one response.
    """
    return Terms.of(signals.sampled_log_prob, advantage=signals.per_token(weight * signals.rewards))


def clipped_policy(
    advantage: Tensor,
    log_ratio: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    ratio_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the coefficient a of ``-log p(y)`` in PPO's clipped objective, and whether the clip has made it 0.

    With A = advantage and rho = exp(log_ratio): ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` has the
    gradient of ``a (-log p)`` with a = rho A, and a = 0 where A > 0 and rho > 1 + clip_high, or A < 0 and
    rho < 1 - clip_low.  A bound of None does not clip.  ``ratio_cap``: the largest rho that multiplies an advantage.
    All tensors [r].
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; two bounds as in DAPO, Yu et al. 2025 (arXiv
    2503.14476).
    """
    ratio = log_ratio.exp()
    clipped = torch.zeros_like(advantage, dtype=torch.bool)
    if clip_high is not None:
        clipped |= (advantage > 0) & (ratio > 1 + clip_high)
    if clip_low is not None:
        clipped |= (advantage < 0) & (ratio < 1 - clip_low)
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    return torch.where(clipped, 0.0, advantage * ratio), clipped
