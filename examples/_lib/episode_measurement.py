# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measurement of a model on the held-out problems of a task with an environment: whole episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from _lib.command_line import CONFIG_NAME
from megatron_selfdistill import config as configuration

if TYPE_CHECKING:
    from megatron_selfdistill.data.contexts import ContextPair


@dataclass(frozen=True)
class PlayedEpisodes:
    """Episodes with every held-out problem, as often as they were sampled."""

    rewards: dict[str, list[float]]
    """The id of a problem -> the sum of the rewards of each of its episodes."""
    turns: list[int]
    """The number of responses of each episode."""
    entropy: float
    """Mean entropy over the tokens of all responses, in nats."""

    @property
    def accuracy(self) -> float:
        """The mean reward of an episode."""
        return mean(reward for rewards in self.rewards.values() for reward in rewards)

    @property
    def solved(self) -> float:
        """The share of the problems that at least one episode solves: pass@k for k episodes per problem."""
        return mean(max(rewards) for rewards in self.rewards.values())


def play(overrides: list[str], num_samples: int, *settings: str) -> PlayedEpisodes:
    """Play ``num_samples`` episodes with every problem of one batch, with the model that ``overrides`` load.

    ``settings`` are further overrides, such as rollout.temperature=0.
    """
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.trainer import Trainer

    sampled = [f"rollout.num_samples={num_samples}"]
    config = configuration.load([*overrides, *sampled, *settings], CONFIG_NAME)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        trainer = Trainer(config, RunData.load(config), grid)
        try:
            batch = trainer.next_batch()
            return episodes_of(batch.contexts, trainer.measure(batch)["entropy/student"])
        finally:
            trainer.close()
    finally:
        ranks.shutdown()


def episodes_of(contexts: Sequence[ContextPair], entropy: float) -> PlayedEpisodes:
    """Return the episodes of several turns to which the responses of ``contexts`` belong."""
    rewards: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    turns: dict[tuple[str, int], int] = defaultdict(int)
    for context in contexts:
        assert context.turn is not None, "the environment has several turns"
        rewards[context.problem_id][context.turn.episode] += context.turn.reward
        turns[context.problem_id, context.turn.episode] += 1
    return PlayedEpisodes(
        {name: list(of_samples.values()) for name, of_samples in rewards.items()}, list(turns.values()), entropy
    )
