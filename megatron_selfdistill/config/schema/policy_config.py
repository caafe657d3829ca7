# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``policy``, ``explanation``, ``verbal`` and ``distill``: how rewards and the teacher weigh tokens.

The loss of a response token y is ``w D(p, q) + a (-log p(y))``; recipes/ computes w and a from these keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.choices import (
    ADVANTAGE_STDS,
    CREDITS,
    DISTILL_RULES,
    DISTILL_SIGNALS,
    MARGIN_GAPS,
    REVISION_BASELINES,
    REWARDS,
    TEACHER_PROMPTS,
)
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.ranges import (
    LogProb,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    Share,
    Temperature,
    Text,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class PolicyConfig:
    """The policy gradient: each response's reward compared with the rewards of the other responses to its problem."""

    weight: NonNegativeFloat = 0.0
    """Weight of the advantages in the loss; 0 trains on no rewards.  The advantage of a logged reply
    (data.solutions=next_state) is its reward."""
    reward: Annotated[str, OneOf(REWARDS, or_dotted=True)] | None = None
    """Dotted path of a function ``reward(response_text, problem)`` that returns a finite number, wherever a run trains
    on verdicts of its responses (also rft and peers); a response with a reward of at least 0.5 counts as right, and a
    truncated response has 0.  Null is the reward of the environment, where there is one, and otherwise 1
    for a response that evaluation.verifier finds right, else 0.  For a logged reply, null is the model's own verdict by
    the next message: 1, -1 or 0.  explanation is the reward of RLT: how well the frozen
    weights find the solution after they have read the response (see explanation).  verbal is a ninth of the score that
    the teacher gives to the response (see verbal)."""
    advantage_std: Annotated[str, OneOf(ADVANTAGE_STDS)] = "sample"
    """What divides the difference of a reward and the mean of its group: sample (the standard deviation with n - 1),
    population (with n) or none (Dr. GRPO)."""
    credit: Annotated[str, OneOf(CREDITS)] = "episode"
    """What is compared in an environment of several turns: episode (the sum of the rewards of an episode, for each of
    its responses) or turn (the return from a response on, with the responses of the same turn)."""
    discount: Share = 1.0
    """Factor by which a reward counts less for the turn before, under credit=turn."""
    revision_weight: NonNegativeFloat = 0.0
    """Weight of the last response of an episode of several turns as an answer to the problem alone, without the replies
    (RLTF-SD).  0 trains on it after the conversation only."""
    revision_warmup_steps: NonNegativeInt = 0
    """Number of steps over which this weight rises linearly from 0; 0 gives it from the first step on."""
    revision_baseline: Annotated[str, OneOf(REVISION_BASELINES)] = "first_turn"
    """What is subtracted from the reward of such a response: first_turn (the mean reward of the first responses to the
    problem) or same_turn (the mean reward of the responses of the same turn)."""
    revision_min_log_prob: LogProb | None = -5.0
    """Log-prob after the problem alone, in nats, below which a token of such a response is not trained on; null trains
    on all."""
    reply_weight: NonNegativeFloat = 0.0
    """Weight of the log-likelihood of the shown replies of episodes, which the model learns to predict (RLTF-FM)."""
    reply_template: Text | None = None
    """Wording of the problem's message before such a reply, with the slots {problem} and {response}; null asks for a
    critique of the attempt."""
    clip_low: Share | None = 0.2
    """Clip of PPO from below: a token with a negative advantage and p / mu < 1 - clip_low has no gradient; null clips
    nothing."""
    clip_high: NonNegativeFloat | None = 0.2
    """Clip of PPO from above: a token with a positive advantage and p / mu > 1 + clip_high has no gradient; null clips
    nothing."""
    ratio_cap: NonNegativeFloat | None = None
    """The largest p / mu that multiplies an advantage; null bounds nothing."""

    def __post_init__(self) -> None:
        check_fields("policy", self)
        require(
            self.revision_warmup_steps == 0 or self.revision_weight > 0,
            f"policy.revision_warmup_steps={self.revision_warmup_steps} needs policy.revision_weight above 0, got "
            f"{self.revision_weight}",
        )
        slots = re.findall(r"(?<!\{)\{([A-Za-z_]\w*)\}", self.reply_template or "")
        require(
            self.reply_template is None or set(slots) == {"problem", "response"},
            f"policy.reply_template must have the slots {{problem}} and {{response}} and no other, got {slots}",
        )
        require(
            self.discount == 1 or self.credit == "turn",
            f"policy.discount={self.discount} discounts the rewards of later turns, but policy.credit=episode adds all "
            "rewards of an episode: set policy.credit=turn",
        )


@dataclass(frozen=True)
class ExplanationConfig:
    """The reward of policy.reward=explanation, for explanations that the policy writes after it has seen the solution.

    The frozen weights read an explanation after the problem.  The reward is r_SS - ratio_weight r_KL, less
    missing_tag_penalty where the closing tag is missing.
    """

    closing_tag: Text = "</think>"
    """Text that ends an explanation.  The solution follows it when the frozen weights read the explanation, and in
    data sets of explanations.  White space at its ends is written there, and is not needed in a response."""
    temperature: Temperature = 0.7
    """Divisor of the logits of all log-probs of the reward."""
    alpha: NonNegativeFloat = 0.01
    """Weight of the least likely token of the solution in r_SS, and of the largest log-ratio of the explanation in
    r_KL."""
    ratio_weight: NonNegativeFloat = 3.0
    """Weight of r_KL, the log-ratio of the policy, which sees the solution, and the frozen weights, which do not."""
    missing_tag_penalty: NonNegativeFloat = 1.0
    """Number that is subtracted from the reward of an explanation without its closing tag."""

    def __post_init__(self) -> None:
        check_fields("explanation", self)
        require(
            self.closing_tag.strip() != "",
            "explanation.closing_tag must be a text that ends an explanation, such as </think>, got white space",
        )


_SLOT = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")


@dataclass(frozen=True)
class VerbalConfig:
    """The scores, 0 to 9, that the teacher gives to responses under rollout.select=verbal or policy.reward=verbal."""

    template: Text | None = None
    """Wording of the last user message with which the teacher is asked for a score.  It has the slots {problem} and
    {response}, and may have {solution}.  Null shows all three and asks for one digit from 0 to 9.  The score is the
    mean of the digits 0 to 9, each with its probability as the first token of the answer; each digit must be one
    token."""
    threshold: Annotated[float, at_least(0), at_most(9)] = 5.0
    """Score below which rollout.select=verbal replaces a response."""
    step_separator: Text | None = None
    """Text in the token that ends a step of a response, such as a line feed.  Under rollout.select=verbal a replaced
    response keeps its beginning up to its last step whose score is at least the threshold.  Null replaces whole
    responses."""

    def __post_init__(self) -> None:
        check_fields("verbal", self)
        slots = {"problem", "response"} if self.template is None else set(_SLOT.findall(self.template))
        require(
            {"problem", "response"} <= slots <= {"problem", "response", "solution"},
            "verbal.template must have the slots {problem} and {response}, and may have {solution}, got "
            + (", ".join(f"{{{slot}}}" for slot in sorted(slots)) or "none"),
        )
        require(self.step_separator != "", "verbal.step_separator must be a text or null, got an empty text")


@dataclass(frozen=True)
class DistillConfig:
    """The teacher's part in the loss of a response with a hint; a response without a hint has no such part."""

    weight: NonNegativeFloat = 1.0
    """Weight of the teacher's part."""
    signal: Annotated[str, OneOf(DISTILL_SIGNALS)] = "full"
    """The form of the teacher's part: full (the divergence over the whole vocabulary), sampled (its form for the
    sampled token: log q(y) - log p(y), times p / mu, as in the k3 estimator) or advantage (log q(y) - log mu(y) as an
    advantage beside the reward's, which the clip of policy holds).  The last two take another forward pass of teacher
    and student per step."""
    teacher_prompt: Annotated[str, OneOf(TEACHER_PROMPTS)] = "hinted"
    """The prompt after which the teacher reads a response: hinted (with the hint) or same (the prompt that the response
    was sampled after, rollout.view, which the student then trains after, too: the divergence from a frozen teacher
    holds the policy near the weights of the start, as the KL penalty of reinforcement learning does)."""
    rule: Annotated[str, OneOf(DISTILL_RULES)] = "uniform"
    """The weights of responses: uniform, scope (right responses teach by likelihood, wrong ones by the teacher,
    weighted by perplexity; needs signal=sampled), uni_opd (right responses are moved above wrong ones; needs
    signal=advantage), pi_distill (responses of the teacher train teacher and student together; needs signal=full,
    rollout.view=privileged and policy.weight above 0) or sod (the turns of an episode that lie far from the teacher
    weigh less; needs signal=advantage and an environment of several turns)."""
    alpha: Share = 0.5
    """Share of the teacher's objective under rule=pi_distill, in 0 to 1; the rest is the student's."""
    tau: Temperature = 1.0
    """Temperature of the weights under rule=scope."""
    margin: NonNegativeFloat = 0.4
    """Smallest difference of right and wrong responses under rule=uni_opd, in nats per token."""
    margin_gap: Annotated[str, OneOf(MARGIN_GAPS)] = "mean"
    """The difference that margin bounds: mean (of the means of right and wrong responses) or min_max (of the least
    right and the greatest wrong response)."""
    max_log_ratio: PositiveFloat = 10.0
    """Bound of |log q(y) - log mu(y)|, in nats, from which on a token is skipped under rule=uni_opd."""
    turn_gain: NonNegativeFloat = 0.2
    """The weight of a turn is at most 1 + turn_gain under rule=sod; the first turn of an episode has a weight of 1."""

    def __post_init__(self) -> None:
        check_fields("distill", self)
        signals = {"scope": "sampled", "uni_opd": "advantage", "pi_distill": "full", "sod": "advantage"}
        signal = signals.get(self.rule, self.signal)
        require(self.signal == signal, f"distill.rule={self.rule} needs distill.signal={signal}, got {self.signal}")
