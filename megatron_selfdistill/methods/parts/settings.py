# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The settings that several methods share, and the checks that bind them to other keys.  Importing needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import MEASURED, READ, SAMPLED, MethodSettings, Needs
from megatron_selfdistill.config.schema.ranges import DottedPath, NonNegativeFloat, OneOf, PositiveFloat, Share

SIGNALS = ("full", "sampled", "advantage")
"""Values of method.signal."""
WEIGHTS = ("reach", "iw_opd", "evidence")
"""Names of token weights, besides functions of the user."""


@dataclass(frozen=True)
class RewardSettings(MethodSettings):
    """The reward of a response."""

    reward: DottedPath | None = None
    """Dotted path of a function ``reward(response_text, problem)`` that returns a finite number.  A response with a
    reward of at least 0.5 counts as right, and a truncated response has 0.  Null is the reward of the environment,
    where there is one, and otherwise 1 for a response that evaluation.verifier finds right, else 0."""


@dataclass(frozen=True)
class SelectSettings(MethodSettings):
    """The selection among the responses of a step by a function."""

    select: DottedPath | None = None
    """Dotted path of a function ``select(problem, responses)``, which gets the text and the reward of each response to
    the problem and returns for each its text, another text, or None to drop it.  Null trains on all responses."""

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where episodes of several turns would be compared."""
        super().check(config)
        turns = config.environment.max_turns
        require(
            self.select is None or turns == 1,
            "method.select compares responses to one prompt, and those of several turns follow different "
            f"conversations: it needs environment.max_turns=1, got {turns}",
        )


@dataclass(frozen=True)
class WeightSettings(MethodSettings):
    """The weights of the response tokens, by a name or a function."""

    token_weights: Annotated[str, OneOf(WEIGHTS, or_dotted=True)] | None = None
    """The factor for the loss of each response token.  Null weighs all tokens alike.  reach: how often the target would
    come to the token's place, in comparison with the sampler.  iw_opd: more for tokens before which student and target
    differ little.  evidence: 1 where the target finds the token at least as likely as the student does, else 0.  With
    these three, one more forward pass of student and target reads their log-probs, and the loss is divided by the sum
    of the weights; a step with a sum below 1 changes nothing.  The dotted path of a function ``weights(signals)``
    returns the factors, [R] float64 at least 0, from the `Signals` of a step."""
    reach_exponent: PositiveFloat = 1.0
    """Power of the weights of token_weights=reach; a smaller one gives later tokens more weight."""
    iw_gain: NonNegativeFloat = 0.5
    """The weight of a response's first token, less 1, with token_weights=iw_opd."""
    evidence_margin: NonNegativeFloat = 0.0
    """Nats by which the target's log-prob must exceed the student's with token_weights=evidence."""
    measured_signals: bool = False
    """Whether the signals for a function token_weights have log-probs and entropies of student and target and their
    divergence, which take another forward pass of both."""

    @property
    def log_probs(self) -> str | None:
        """The value of `Needs.log_probs` for these settings."""
        if self.measured_signals:
            return MEASURED
        return READ if self.token_weights in WEIGHTS else None

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where the tokens of responses that nobody samples are to be weighed, or no pass reads."""
        super().check(config)
        key = f"method.token_weights={self.token_weights}"
        require(
            self.token_weights in (None, *WEIGHTS) or config.samples_responses,
            f"{key} weighs the tokens of sampled responses, but conversations.responses=logged samples nothing: set "
            f"{', '.join(WEIGHTS)} or null, or conversations.responses=sampled",
        )
        require(
            self.token_weights not in WEIGHTS or self.needs.log_probs in (MEASURED, READ),
            f"{key} reads log-probs of student and target, which method.name={self.name} does not measure: unset it",
        )


@dataclass(frozen=True)
class ClipSettings(MethodSettings):
    """The bounds of the ratio p / mu that multiplies an advantage."""

    clip_low: Share | None = 0.2
    """Clip of PPO from below: a token with a negative advantage and p / mu < 1 - clip_low has no gradient; null clips
    nothing."""
    clip_high: NonNegativeFloat | None = 0.2
    """Clip of PPO from above: a token with a positive advantage and p / mu > 1 + clip_high has no gradient; null clips
    nothing."""
    ratio_cap: NonNegativeFloat | None = None
    """The largest p / mu that multiplies an advantage; null bounds nothing."""


@dataclass(frozen=True)
class AdvantageSettings(ClipSettings, RewardSettings):
    """The policy gradient: each response's reward compared with the rewards of the other responses to its problem."""

    weight: NonNegativeFloat = 1.0
    """Weight of the advantages of rewards in the loss."""
    advantage_std: Annotated[str, OneOf(("sample", "population", "none"))] = "sample"
    """What divides the difference of a reward and the mean of its group: sample (the standard deviation with n - 1),
    population (with n) or none (Dr. GRPO)."""
    credit: Annotated[str, OneOf(("episode", "turn"))] = "episode"
    """What is compared in an environment of several turns: episode (the sum of the rewards of an episode, for each of
    its responses) or turn (the return from a response on, with the responses of the same turn)."""
    discount: Share = 1.0
    """Factor by which a reward counts less for the turn before, under credit=turn."""


@dataclass(frozen=True)
class DistillSettings(MethodSettings):
    """The teacher's part in the loss of a response with a hint; a response without a hint has no such part."""

    distill_weight: PositiveFloat = 1.0
    """Weight of the teacher's part."""


@dataclass(frozen=True)
class SignalSettings(DistillSettings):
    """The form of the teacher's part."""

    signal: Annotated[str, OneOf(SIGNALS)] = "full"
    """The form of the teacher's part: full (the divergence over the whole vocabulary), sampled (its form for the
    sampled token: log q(y) - log p(y), times p / mu, as in the k3 estimator) or advantage (log q(y) - log mu(y) as an
    advantage beside the reward's, which the clip holds).  The last two take another forward pass of teacher and student
    per step."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether the loss of a token is more than the divergence over the whole vocabulary with the weight 1."""
        return self.needs.log_probs is not None or self.distill_weight != 1


@dataclass(frozen=True)
class DistillAndRewardSettings(SignalSettings, AdvantageSettings, SelectSettings):
    """The teacher's part and the part of rewards in one loss."""

    @property
    def log_probs(self) -> str | None:
        """The value of `Needs.log_probs` for these settings."""
        if self.signal != "full":
            return MEASURED
        return SAMPLED if self.weight > 0 else None

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        rewards = self.weight > 0
        return Needs(
            log_probs=self.log_probs, rewards=rewards or self.select is not None, group_size=2 if rewards else 1
        )
