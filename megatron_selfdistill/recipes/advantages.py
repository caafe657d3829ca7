# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Advantages from the rewards of a group, and the clip of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms

EPSILON = 1e-6
"""The number added to the standard deviation of a group's rewards."""


def group_advantages(signals: Signals, std: str) -> Tensor:
    """Return the advantage [B] of each response: its reward minus the mean reward of its group.

    ``std``: what divides the difference: "sample" (the standard deviation with n - 1, plus `EPSILON`), "population"
    (with n, plus `EPSILON`) or "none".  A group whose rewards are all equal has advantages of 0.
    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; without the division Dr. GRPO, Liu et al. 2025
    (arXiv 2503.20783).
    """
    rewards, groups = signals.rewards, signals.groups
    count = signals.sum_per_group(torch.ones_like(rewards))
    difference = rewards - (signals.sum_per_group(rewards) / count)[groups]
    if std == "none":
        return difference
    degrees = (count - 1 if std == "sample" else count).clamp(min=1)
    return difference / ((signals.sum_per_group(difference**2) / degrees).sqrt()[groups] + EPSILON)


def group_advantage(signals: Signals, *, weight: float, std: str) -> Terms:
    """Return the terms of policy gradients: the advantage of a response (`group_advantages`) for each of its tokens."""
    advantages = weight * group_advantages(signals, std)
    return Terms.of(signals.sampled_log_prob, advantage=signals.per_token(advantages))


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
