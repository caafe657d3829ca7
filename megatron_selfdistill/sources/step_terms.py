# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The coefficients of a step's response tokens: the configured rule, applied to the answers of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import SequenceImportance, TokenOwners, TruncatedImportance
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.model.host_to_device import to_device_in_one_copy
from megatron_selfdistill.pipeline.batch import over_last_stage
from megatron_selfdistill.pipeline.token_losses import TokenCoefficients
from megatron_selfdistill.recipes.advantages import group_advantage, group_advantages, reward_advantage
from megatron_selfdistill.recipes.normalization import token_factors
from megatron_selfdistill.recipes.pi_distill import pi_distill
from megatron_selfdistill.recipes.ratio_terms import RatioTerms
from megatron_selfdistill.recipes.rltf import extra_likelihood, likelihood_floors, revision_advantages, weight_at
from megatron_selfdistill.recipes.scope import scope
from megatron_selfdistill.recipes.signals import Signals, Terms
from megatron_selfdistill.recipes.sod import sod
from megatron_selfdistill.recipes.teacher_terms import uniform
from megatron_selfdistill.recipes.uni_opd import uni_opd
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import over_replicas

Measure = Callable[[Sequence[ContextPair]], tuple[Tensor, Tensor]]
"""A function of this replica's contexts that returns log p and log q of every response token, [R] float64 each, on the
host.  Collective over the world."""


@dataclass(frozen=True)
class StepTerms:
    """The rule that the configuration names for the tokens of sampled responses."""

    config: Config
    measure: Measure
    grid: RankGrid
    phases: Phases

    def coefficients(self, step: int, answers: Sequence[Answer], contexts: Sequence[ContextPair]) -> TokenCoefficients:
        """Return the coefficients of the tokens of ``contexts``, the contexts of these answers of this replica.

        ``step``: the number of optimizer steps before this one.  Revisions and replies (`Answer.part`) come after all
        responses.
        Collectives: those of ``measure`` where the rule needs log-probs of student and target, and a sum over the
        data-parallel ranks where loss.normalize is not tokens.
        """
        config, student, target = self.config, None, None
        if config.measures_log_probs:
            with self.phases("measure"):
                student, target = self.measure(contexts)
        signals = signals_of(answers, student, target)
        if config.logged and student is not None:  # nobody sampled the replies from the student: p / mu = 1
            signals = replace(signals, sampled_log_prob=student)
        terms, floor = _all_terms(config, step, answers, signals)
        terms = terms.scaled(
            token_factors(signals, config.loss.normalize, self._totals(signals), config.loss.skip_first_tokens)
        )
        on_host = RatioTerms(
            terms=terms,
            sampled_log_prob=signals.sampled_log_prob,
            target_log_prob=target,
            clip_low=config.policy.clip_low,
            clip_high=config.policy.clip_high,
            ratio_cap=config.policy.ratio_cap,
            correction=self._correction(signals),
            likelihood_floor=floor,
            has_policy_term=config.has_policy_term or config.objective == "policy_gradient",
        )
        return to_device_in_one_copy(on_host, self.grid.device)

    def _correction(self, signals: Signals) -> TokenCoefficients | None:
        kind, cap = self.config.loss.rollout_correction, self.config.loss.rollout_correction_cap
        if kind == "none":
            return None
        if kind == "truncated":
            return TruncatedImportance(signals.sampled_log_prob, cap)
        owners = TokenOwners.of(signals.lengths.tolist(), partial(over_last_stage, grid=self.grid))
        return SequenceImportance(signals.sampled_log_prob, owners, cap)

    def _totals(self, signals: Signals) -> tuple[float, float, float]:
        """Return the numbers of tokens, responses and groups of the global batch, where the loss needs them."""
        counts = len(signals.sampled_log_prob), len(signals.lengths), signals.num_groups
        if self.config.loss.normalize == "tokens":
            return counts
        num_tokens, num_responses, num_groups = over_replicas(counts, self.grid)
        return num_tokens, num_responses, num_groups


def signals_of(answers: Sequence[Answer], student: Tensor | None = None, target: Tensor | None = None) -> Signals:
    """Return the signals of one replica's answers, on the host; ``student`` and ``target``: measured log-probs [R]."""
    # Each view of a group is a group of its own.
    groups = _numbered([(answer.group, answer.privileged) for answer in answers])
    episodes = _numbered([(a.episode, a.privileged) if a.episode is not None else i for i, a in enumerate(answers)])
    sampled = [value for answer in answers for value in answer.response.sampled_log_probs]
    return Signals(
        lengths=torch.tensor([len(answer.response.token_ids) for answer in answers], dtype=torch.int64),
        groups=torch.tensor(groups, dtype=torch.int64),
        rewards=torch.tensor([answer.reward or 0.0 for answer in answers], dtype=torch.float64),
        hinted=torch.tensor([answer.hinted for answer in answers], dtype=torch.bool),
        privileged=torch.tensor([answer.privileged for answer in answers], dtype=torch.bool),
        sampled_log_prob=torch.tensor(sampled, dtype=torch.float64),
        student_log_prob=student,
        target_log_prob=target,
        episodes=torch.tensor(episodes, dtype=torch.int64),
        turns=torch.tensor([answer.turn for answer in answers], dtype=torch.int64),
    )


def _numbered(owners: Sequence[Hashable]) -> list[int]:
    """Return the number of each owner: 0 for the first one, 1 for the next different one, and so on."""
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return [numbers[owner] for owner in owners]


def _all_terms(config: Config, step: int, answers: Sequence[Answer], signals: Signals) -> tuple[Terms, Tensor | None]:
    """Return the terms of all tokens, and the floors of their likelihood terms.

    The floors are None if the configuration gives no token a floor, which is then true of all replicas.
    """
    responses = [answer for answer in answers if answer.part == "response"]
    extra = answers[len(responses) :]
    policy, num_tokens = config.policy, sum(len(answer.response.token_ids) for answer in responses)
    none = torch.full((num_tokens,), -math.inf, dtype=torch.float64)
    if not extra:  # but other replicas may have some
        return rule_terms(config, signals), none if policy.revision_weight or policy.reply_weight else None
    measured = (signals.student_log_prob, signals.target_log_prob)
    own = signals_of(responses, *(None if values is None else values[:num_tokens] for values in measured))
    advantages = revision_advantages(own, policy.revision_baseline)
    places = {(answer.episode, answer.turn): i for i, answer in enumerate(responses)}
    is_revision = torch.tensor([answer.part == "revision" for answer in extra])
    likelihood = extra_likelihood(
        advantages[[places[answer.episode, answer.turn] for answer in extra]],
        is_revision,
        revision_weight=weight_at(step, policy.revision_weight, policy.revision_warmup_steps),
        reply_weight=policy.reply_weight,
    )
    lengths = signals.lengths[len(responses) :]
    floors = likelihood_floors(is_revision, policy.revision_min_log_prob).repeat_interleave(lengths)
    return rule_terms(config, own).extended(likelihood.repeat_interleave(lengths)), torch.cat([none, floors])


def rule_terms(config: Config, signals: Signals) -> Terms:
    """Return the terms that ``config`` gives to all tokens: the teacher's part plus the part of rewards."""
    distill, policy = config.distill, config.policy
    if config.objective == "self_distillation" and distill.rule == "pi_distill":
        advantages = policy.weight * group_advantages(signals, policy.advantage_std, policy.credit, policy.discount)
        return pi_distill(signals, advantages, beta=distill.weight, alpha=distill.alpha)
    terms = _teacher_terms(config, signals)
    if policy.weight > 0 and config.logged:
        terms += reward_advantage(signals, weight=policy.weight)
    elif policy.weight > 0:
        terms += group_advantage(
            signals,
            weight=policy.weight,
            std=policy.advantage_std,
            credit=policy.credit,
            discount=policy.discount,
        )
    return terms


def _teacher_terms(config: Config, signals: Signals) -> Terms:
    distill = config.distill
    if config.objective == "policy_gradient":
        return Terms.of(signals.sampled_log_prob)
    if config.objective != "self_distillation":
        return uniform(signals, weight=1.0, signal="full")
    if distill.rule == "scope":
        return scope(signals, weight=distill.weight, tau=distill.tau)
    if distill.rule == "sod":
        return sod(signals, weight=distill.weight, gain=distill.turn_gain)
    if distill.rule == "uni_opd":
        return uni_opd(
            signals,
            weight=distill.weight,
            margin=distill.margin,
            gap=distill.margin_gap,
            max_log_ratio=distill.max_log_ratio,
        )
    return uniform(signals, weight=distill.weight, signal=distill.signal)
