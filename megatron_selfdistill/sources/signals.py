# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a method knows about the responses of a step (signals), and what it says about their tokens (terms)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_selfdistill.loss.token_weights import reach

if TYPE_CHECKING:
    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.sources.rollouts import Rollout


@dataclass(frozen=True)
class Signals:
    """The B responses of a step on one replica and their R tokens, as arrays on one device.

    The tokens of the responses follow each other, as in ``PackedBatch.response_tokens``.  All ranks of the replica hold
    the same bits, so that a method, which is a pure function of these arrays, gives the same bits on all of them.
    Log-probs are in nats.  p is the student, mu the distribution that the token was sampled from, and q the target.
    """

    lengths: Tensor
    """Number of tokens of each response, [B] int64; at least 1."""
    groups: Tensor
    """The group of each response, [B] int64 from 0: a group is all responses to one problem."""
    rewards: Tensor
    """Reward of each response, [B] float64."""
    hinted: Tensor
    """Whether the teacher's prompt of the response shows a hint, [B] bool."""
    privileged: Tensor
    """Whether the response is trained on after the teacher's prompt, which shows the hint, [B] bool.  The student p is
    then the model after that prompt."""
    sampled_log_prob: Tensor
    """log mu of each token, [R] float64."""
    student_log_prob: Tensor | None = None
    """log p of each token, [R] float64; None if no pass has measured it."""
    target_log_prob: Tensor | None = None
    """log q of each token, [R] float64; None if no pass has measured it."""
    student_entropy: Tensor | None = None
    """H(p) at each token, [R] float64 nats; None if no pass has measured it."""
    target_entropy: Tensor | None = None
    """H(q) at each token, [R] float64 nats; None if no pass has measured it.  With target=teacher_alone q is the
    teacher."""
    divergence: Tensor | None = None
    """D(p, q) at each token, the divergence of the loss, [R] float64 nats; None if no pass has measured it."""
    episodes: Tensor | None = None
    """The episode of each response, [B] int64 from 0, whose responses are all of one group; None if every response is
    an episode."""
    turns: Tensor | None = None
    """The number of each response within its episode, [B] int64 from 0; None if all numbers are 0."""

    @property
    def num_groups(self) -> int:
        """The number of groups: one more than the last group's number."""
        return int(self.groups.max()) + 1 if len(self.groups) else 0

    @property
    def right(self) -> Tensor:
        """Whether each response is right, [B] bool: its reward is at least .5."""
        return self.rewards >= 0.5

    def per_token(self, values: Tensor) -> Tensor:
        """Return [R]: the value of each token's response; ``values [B]``."""
        return values.repeat_interleave(self.lengths)

    def mean_per_sample(self, values: Tensor) -> Tensor:
        """Return [B]: the mean over the tokens of each response; ``values [R]``."""
        owner = self.per_token(torch.arange(len(self.lengths), device=values.device))
        return values.new_zeros(len(self.lengths)).index_add_(0, owner, values) / self.lengths

    def sum_per_group(self, values: Tensor) -> Tensor:
        """Return [num_groups]: the sum over the responses of each group; ``values [B]``."""
        return values.new_zeros(self.num_groups).index_add_(0, self.groups, values)


@dataclass(frozen=True)
class Terms:
    """What a method says about the R tokens: four numbers per token, constants of the loss.

    With rho = p(y) / mu(y), the coefficients of the loss ``w D(p, q) + a (-log p(y))`` are

        w = divergence
        a = rho advantage, bounded as in PPO  +  rho sampled_kl (log q(y) - log p(y))  +  likelihood

    Each of them is [R] float64.
    """

    divergence: Tensor
    """Weight of the divergence over the whole vocabulary, at least 0."""
    advantage: Tensor
    """Advantage of the token."""
    sampled_kl: Tensor
    """Weight of KL(p || q) in its form for the sampled token: the k3 estimator with the ratio rho has this gradient."""
    likelihood: Tensor
    """Weight of the token's log-likelihood, without rho."""
    likelihood_floor: Tensor | None = None
    """The log p below which each token has no likelihood term, [R] float64; None is minus infinity."""

    @classmethod
    def of(
        cls,
        like: Tensor,
        *,
        divergence: Tensor | None = None,
        advantage: Tensor | None = None,
        sampled_kl: Tensor | None = None,
        likelihood: Tensor | None = None,
    ) -> Terms:
        """Return the given terms, and zeros in the shape of ``like`` for the others."""
        given = {"divergence": divergence, "advantage": advantage, "sampled_kl": sampled_kl, "likelihood": likelihood}
        return cls(**{name: torch.zeros_like(like) if value is None else value for name, value in given.items()})

    def __add__(self, other: Terms) -> Terms:
        """Return the sum of both, token by token."""
        floor = self.likelihood_floor if other.likelihood_floor is None else other.likelihood_floor
        both = zip(self._weights, other._weights, strict=True)
        divergence, advantage, sampled_kl, likelihood = (one + another for one, another in both)
        return Terms(divergence, advantage, sampled_kl, likelihood, floor)

    def extended(self, likelihood: Tensor) -> Terms:
        """Return these terms, followed by those of tokens with a ``likelihood [n]`` alone."""
        more = Terms.of(likelihood, likelihood=likelihood)
        return Terms(*[torch.cat(pair) for pair in zip(self._weights, more._weights, strict=True)])

    def scaled(self, factor: Tensor) -> Terms:
        """Return these terms times ``factor [R]``."""
        divergence, advantage, sampled_kl, likelihood = (weight * factor for weight in self._weights)
        return Terms(divergence, advantage, sampled_kl, likelihood, self.likelihood_floor)

    @property
    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.divergence, self.advantage, self.sampled_kl, self.likelihood


@dataclass(frozen=True)
class Clip:
    """The bounds of the ratio p / mu that multiplies an advantage, as in PPO."""

    low: float | None = None
    """A token with a negative advantage and a ratio below 1 - low has no gradient; None bounds nothing."""
    high: float | None = None
    """A token with a positive advantage and a ratio above 1 + high has no gradient; None bounds nothing."""
    ratio_cap: float | None = None
    """The largest ratio that multiplies an advantage; None bounds nothing."""


MEASURED_SIGNALS = ("student_log_prob", "target_log_prob", "student_entropy", "target_entropy", "divergence")
"""The signals that only a measuring pass knows."""


def signals_of(rollouts: Sequence[Rollout], measured: Mapping[str, Tensor] | None = None) -> Signals:
    """Return the signals of one replica's rollouts, on the host; ``measured``: the `MEASURED_SIGNALS`, [R] each."""
    # Each view of a group is a group of its own.
    groups = _numbered([(rollout.group, rollout.privileged) for rollout in rollouts])
    episodes = _numbered([(a.episode, a.privileged) if a.episode is not None else i for i, a in enumerate(rollouts)])
    sampled = [value for rollout in rollouts for value in rollout.response.sampled_log_probs]
    return Signals(
        lengths=torch.tensor([len(rollout.response.token_ids) for rollout in rollouts], dtype=torch.int64),
        groups=torch.tensor(groups, dtype=torch.int64),
        rewards=torch.tensor([rollout.reward or 0.0 for rollout in rollouts], dtype=torch.float64),
        hinted=torch.tensor([rollout.hinted for rollout in rollouts], dtype=torch.bool),
        privileged=torch.tensor([rollout.privileged for rollout in rollouts], dtype=torch.bool),
        sampled_log_prob=torch.tensor(sampled, dtype=torch.float64),
        **(measured or {}),
        episodes=torch.tensor(episodes, dtype=torch.int64),
        turns=torch.tensor([rollout.turn for rollout in rollouts], dtype=torch.int64),
    )


def reach_of(signals: Signals, rollout: RolloutConfig, *, exponent: float = 1.0) -> Tensor:
    """Return the `reach` [R] float64 of each token, which starts anew at each turn of an episode.

    mu is what sampled the token.  Where mu is unknown, as for a text that replaces a response, or has another
    temperature than 1 or a cut, the student p has the place of mu: a sharper mu alone would make the reach fall along
    every response, also where the target is the student.  Needs `Signals.student_log_prob` and
    `Signals.target_log_prob`.
    """
    target, student, sampled = signals.target_log_prob, signals.student_log_prob, signals.sampled_log_prob
    assert target is not None and student is not None, "the reach needs a measuring pass"
    is_plain = (rollout.temperature, rollout.top_k, rollout.top_p) == (1, 0, 1)
    mu = torch.where(sampled.isnan(), student, sampled) if is_plain else student
    return reach(target, mu, signals.lengths.tolist(), exponent=exponent)


def _numbered(owners: Sequence[Hashable]) -> list[int]:
    """Return the number of each owner: 0 for the first one, 1 for the next different one, and so on."""
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return [numbers[owner] for owner in owners]
