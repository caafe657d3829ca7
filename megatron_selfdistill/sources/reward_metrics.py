# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The metrics of the rewards of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.sources.problem_prompts import Answer


def reward_metrics(answers: Sequence[Answer], trained: Sequence[Answer], grid: RankGrid) -> dict[str, float]:
    """Return metrics of the verdicts on all ``answers`` of a step, in the order of their groups; equal on all ranks.

    rewards/mean: the mean reward.  rewards/mixed_groups: the share of the groups whose rewards are not all equal, the
    only groups with advantages; episodes are compared by the rewards of all their turns.  rewards/trained_share: the
    share of the answers that are ``trained`` on.
    Collectives: one sum over the data-parallel ranks.
    """
    groups = [_rewards_of_episodes(group) for _, group in groupby(answers, key=lambda a: a.group)]
    mixed = sum(len(set(group)) > 1 for group in groups)
    total = sum(answer.reward or 0.0 for answer in answers)
    total, number, mixed_groups, num_groups, num_trained = over_replicas(
        (total, len(answers), mixed, len(groups), len(trained)), grid
    )
    return {
        "rewards/mean": total / max(number, 1),
        "rewards/mixed_groups": mixed_groups / max(num_groups, 1),
        "rewards/trained_share": num_trained / max(number, 1),
    }


def _rewards_of_episodes(group: Iterable[Answer]) -> list[tuple[float | None, ...]]:
    """Return the rewards of each episode of a group, turn by turn."""
    episodes: dict[object, list[float | None]] = {}
    for i, answer in enumerate(group):
        owner = ("alone", i) if answer.episode is None else answer.episode
        episodes.setdefault(owner, []).append(answer.reward)
    return [tuple(rewards) for rewards in episodes.values()]


def over_replicas(values: Sequence[float], grid: RankGrid) -> list[float]:
    """Return the sums of ``values`` over the data-parallel ranks, in float64.  Collectives: one sum over them."""
    totals = torch.tensor(values, dtype=torch.float64, device=grid.device)
    dist.all_reduce(totals, group=grid.dp_group)
    found: list[float] = totals.tolist()
    return found
