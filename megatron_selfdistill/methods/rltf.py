# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""RLTF: what a model learns from the text of an environment beside the rewards, without the text in its prompt.

Algorithm: An episode is a response y0 after the problem x, the critique c0 of an environment (docs/environments.md),
and a second response y1 after (x, y0, c0). A right y0 should end the episode (`Reply.done`). Beside the rewards,
rltf_sd learns y1 without the critique, and rltf_fm learns to predict the critique. There is no teacher.

Equation: With R the reward of a response, every trained token has the loss `a (-log p)`:

    y0 after x            a = rho A0,  A0 = R(y0) + 0.1 R(y1), less its mean over the problem's episodes
    y1 after (x, y0, c0)  a = rho A1,  A1 = R(y1), less its mean over those with a second response
    rltf_sd: y1 after x   a = 0.1 (R(y1) - mean R(y0)),   and 0 where log p(token | x) < -5
                          no rho, since y1 was sampled after another prompt
    rltf_fm: c0 after a request for a critique of y0    a = 0.1

The request is method.reply_template, filled with problem and response, in place of the problem's message. The sums are
divided by the number N of trained tokens.

Paper: Song et al. 2026 (arXiv 2602.02482). Published are 32 problems of 8 episodes, the discount .1, the weights .1 of
both terms, the baseline and the mask at -5 of rltf_sd, importance weights without a clip, no standard deviation.

Differences:
- Ours are the wording of the request, and the division by the number of trained tokens.
- The released code has an option for the baseline of rltf_sd that does not reach the function that builds the data: it
  runs with method.revision_baseline=same_turn, the second responses compared with each other.
- For mathematics the paper raises the weight of rltf_sd linearly from 0 to .1: set method.revision_warmup_steps.
- The paper's critique comes from a judge model, has under 50 words, and never has the solution. Yours comes from your
  environment, and a judge can stand behind an endpoint. method.revision_weight=0.1 adds rltf_sd to rltf_fm.

Command:

    selfdistill recipe=rltf_sd environment.name=my_package.Judge checkpoint.load=... data.tokenizer=... \
        data.path=problems.jsonl run_dir=runs/rltf_sd
    selfdistill recipe=rltf_fm environment.name=my_package.Judge checkpoint.load=... data.tokenizer=... \
        data.path=problems.jsonl run_dir=runs/rltf_fm

Expected: 100 steps of 2 x 16 responses raise the sampled accuracy from .32 to .75 (rltf_sd) and .67 (rltf_fm), where
GRPO ends at .84 (docs/recipes/comparison.md).

Known failure:
- A critique that tells the answer: y1 copies it, and rltf_sd teaches the answer without the way to it; under rltf_fm
  the model learns to guess it.
- A y1 that is far from p(. | x): the mask then leaves little of it.
- Critiques that are too long for data.max_length are skipped: see `episodes/replies_trained_share`.
- Where `episodes/last_reward_mean` rises and `episodes/first_reward_mean` does not, the model learns to read critiques.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.field_checks import require, require_slots
from megatron_selfdistill.config.schema.method_config import Needs
from megatron_selfdistill.config.schema.ranges import LogProb, NonNegativeFloat, NonNegativeInt, OneOf, Text
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.grpo import Grpo, GrpoSettings
from megatron_selfdistill.methods.parts.terms import group_advantages
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout, without_hint
from megatron_selfdistill.sources.signals import Signals, Terms, signals_of

DEFAULT_REPLY_TEMPLATE = """\
You are given a question and an attempt to answer it below. Write a critique of the attempt.

{problem}

Attempt: {response}

Critique:"""
"""The value of method.reply_template for null."""


@dataclass(frozen=True)
class RltfSettings(GrpoSettings):
    """The settings of RLTF: RLTF-SD with a weight of revisions, RLTF-FM with a weight of replies."""

    revision_weight: NonNegativeFloat = 0.0
    """Weight of the last response of an episode of several turns as an answer to the problem alone, without the replies
    (RLTF-SD).  0 trains on it after the conversation only."""
    revision_warmup_steps: NonNegativeInt = 0
    """Number of steps over which this weight rises linearly from 0; 0 gives it from the first step on."""
    revision_baseline: Annotated[str, OneOf(("first_turn", "same_turn"))] = "first_turn"
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

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slots("method.reply_template", self.reply_template, ("problem", "response"))

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, contexts_per_sample=2)

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where episodes have one turn, so that nothing follows a reply."""
        super().check(config)
        wanted = config.environment
        require(
            wanted.max_turns > 1 or not (self.revision_weight or self.reply_weight),
            "method.name=rltf trains on texts of episodes of several turns beside their rewards: it needs "
            f"environment.name and environment.max_turns of at least 2, got {wanted.name} and {wanted.max_turns}",
        )


class Rltf(Grpo):
    """GRPO on episodes, with the revisions and the replies of the episodes as further texts."""

    Settings = RltfSettings

    def texts(self, rollouts: Sequence[Rollout], selected: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the selected rollouts, then the revisions and the replies of all episodes; and metrics.

        episodes/replies_trained_share: the share of the shown replies that are trained on; the others are too long.
        Collectives: one sum over the data-parallel ranks, where replies are trained on.
        """
        trained, metrics = super().texts(rollouts, selected)
        own = self.settings
        if not (own.revision_weight or own.reply_weight):
            return trained, metrics
        revisions: list[Rollout] = []
        replies: list[Rollout | None] = []
        for _, members in groupby(rollouts, key=lambda one: one.episode):
            episode = list(members)
            if own.revision_weight and len(episode) > 1:
                prompts = without_hint(episode[0].prompts)
                alone = replace(episode[-1], problem=episode[0].problem, prompts=prompts)
                revisions.append(replace(alone, hinted=False, part="revision"))
            if own.reply_weight:
                replies += [self._reply(rollout) for rollout in episode[:-1]]
        if not own.reply_weight:
            return [*trained, *revisions], metrics
        known = [reply for reply in replies if reply is not None]
        num_known, number = over_replicas((len(known), len(replies)), self.tools.grid)
        share = num_known / max(number, 1)
        return [*trained, *revisions, *known], {**metrics, "episodes/replies_trained_share": share}

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the terms of GRPO for the responses, and the likelihood of revisions and replies, with their floors.

        No token has a floor where no text is added on any replica.
        """
        own = self.settings
        responses = [rollout for rollout in rollouts if rollout.part == "response"]
        extra = rollouts[len(responses) :]
        num_tokens = sum(len(rollout.response.token_ids) for rollout in responses)
        none = torch.full((num_tokens,), -math.inf, dtype=torch.float64)
        if not extra:  # but other replicas may have some
            floor = none if own.revision_weight or own.reply_weight else None
            return replace(super().terms(step, rollouts, signals), likelihood_floor=floor)
        of_responses = signals_of(responses)
        advantages = revision_advantages(of_responses, own.revision_baseline)
        places = {(rollout.episode, rollout.turn): i for i, rollout in enumerate(responses)}
        is_revision = torch.tensor([rollout.part == "revision" for rollout in extra])
        of_extra = advantages[[places[rollout.episode, rollout.turn] for rollout in extra]]
        weight, warmup = own.revision_weight, own.revision_warmup_steps
        weight = weight if step >= warmup else weight * step / warmup
        # No coefficient has a ratio p / mu, since the texts were written after other prompts.
        likelihood = torch.where(is_revision, weight * of_extra, own.reply_weight)
        lengths = signals.lengths[len(responses) :]
        least = -math.inf if own.revision_min_log_prob is None else own.revision_min_log_prob
        # A token that the model finds very unlikely without the environment's text teaches what the text gave away.
        floors = torch.where(is_revision, least, -math.inf).double().repeat_interleave(lengths)
        terms = super().terms(step, responses, of_responses).extended(likelihood.repeat_interleave(lengths))
        return replace(terms, likelihood_floor=torch.cat([none, floors]))

    def _reply(self, rollout: Rollout) -> Rollout | None:
        """Return the reply that the next turn shows, as the answer to a request for it; None if it is too long."""
        given, template = self.tools.given, self.settings.reply_template or DEFAULT_REPLY_TEMPLATE
        builder, problem, reply = given.builder, rollout.problem, rollout.reply
        assert reply is not None and reply.text is not None, "a turn follows a reply"
        response = response_text(rollout.response, builder.tokenizer)
        prompt = builder.filled_prompt(problem, template, {"response": response})
        token_ids = [*builder.tokenizer.encode(reply.text), self.tools.run_data.stop_token_ids[0]]
        if len(prompt) + len(token_ids) > given.max_length:
            return None
        certain = [0.0] * len(token_ids)  # nothing was sampled, and no ratio is taken
        pair = PromptPair(problem.id, prompt, prompt)
        text = Response(token_ids, certain, certain, "stop")
        return replace(rollout, prompts=pair, response=text, hinted=False, part="reply")


def revision_advantages(signals: Signals, baseline: str) -> Tensor:
    """Return [B]: the advantage of each response as an answer to the problem alone; ``baseline``: as the setting."""
    if baseline == "same_turn":
        return group_advantages(signals, "none", "turn", 0.0)
    assert signals.turns is not None, "an environment gives turns"
    first = (signals.turns == 0).to(signals.rewards)
    mean = signals.sum_per_group(signals.rewards * first) / signals.sum_per_group(first)
    return signals.rewards - mean[signals.groups]
