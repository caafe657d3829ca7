# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The verdicts of a verifier or a reward function on the responses of a step, and the metrics of the rewards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.evaluation.verify import Reward, Verifier, judge, judged_text, rewards
from megatron_selfdistill.sources.rollouts import Rollout

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass(frozen=True)
class Judge:
    """The verdicts of a verifier on the rollouts of all replicas."""

    verifier: Verifier
    tokenizer: Tokenizer
    grid: RankGrid
    reward: Reward | None = None
    """The function that rewards responses; None is 1 for the verdict right, else 0."""
    confidence: re.Pattern[str] | None = None
    """The pattern of a stated confidence, which verifier and reward function do not see; None hides nothing."""

    def right(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Return whether each rollout of this replica is right, equal on all ranks of the replica.

        A truncated response is wrong.  Collective over the world.
        """
        return judge(self._questions(rollouts), self.verifier, self.grid)

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the reward of each rollout of this replica, equal on all ranks of the replica.

        A truncated response has 0.  Collective over the world.
        """
        return rewards(self._questions(rollouts), self.reward or self.verifier, self.grid)

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Mapping[str, float]]:
        """Return the rollouts with their `rewards`, and no metrics of its own.  Collective over the world."""
        return [replace(one, reward=reward) for one, reward in zip(rollouts, self.rewards(rollouts), strict=True)], {}

    def _questions(self, rollouts: Sequence[Rollout]) -> list[tuple[Problem, str | None]]:
        return [(one.problem, None if one.response.truncated else self._text(one)) for one in rollouts]

    def _text(self, rollout: Rollout) -> str:
        return judged_text(rollout.response, self.tokenizer, self.confidence)[2]


def reward_metrics(rollouts: Sequence[Rollout], trained: Sequence[Rollout], grid: RankGrid) -> dict[str, float]:
    """Return metrics of the verdicts on all ``rollouts`` of a step, in the order of their groups; equal on all ranks.

    rewards/mean: the mean reward.  rewards/mixed_groups: the share of the groups whose rewards are not all equal, the
    only groups with advantages; episodes are compared by the rewards of all their turns.  rewards/trained_share: the
    share of the rollouts that are ``trained`` on.
    Collectives: one sum over the data-parallel ranks.
    """
    groups = [_rewards_of_episodes(group) for _, group in groupby(rollouts, key=lambda a: a.group)]
    mixed = sum(len(set(group)) > 1 for group in groups)
    total = sum(one.reward or 0.0 for one in rollouts)
    total, number, mixed_groups, num_groups, num_trained = over_replicas(
        (total, len(rollouts), mixed, len(groups), len(trained)), grid
    )
    return {
        "rewards/mean": total / max(number, 1),
        "rewards/mixed_groups": mixed_groups / max(num_groups, 1),
        "rewards/trained_share": num_trained / max(number, 1),
    }


def _rewards_of_episodes(group: Iterable[Rollout]) -> list[tuple[float | None, ...]]:
    episodes: dict[object, list[float | None]] = {}
    for i, one in enumerate(group):
        episodes.setdefault(("alone", i) if one.episode is None else one.episode, []).append(one.reward)
    return [tuple(rewards) for rewards in episodes.values()]


def over_replicas(values: Sequence[float], grid: RankGrid) -> list[float]:
    """Return the sums of ``values`` over the data-parallel ranks, in float64.  Collectives: one sum over them."""
    totals = torch.tensor(values, dtype=torch.float64, device=grid.device)
    dist.all_reduce(totals, group=grid.dp_group)
    found: list[float] = totals.tolist()
    return found
