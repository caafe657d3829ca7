# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The coefficients of a step's loss, from the terms of the method and the log-probs of the forward pass itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.method_config import MEASURED, READ
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import Coefficients, SequenceImportance, TokenOwners, TruncatedImportance
from megatron_selfdistill.metrics.guards import WEIGHTS_POSITION, WEIGHTS_SUM, trains_on_nothing
from megatron_selfdistill.pipeline.score import over_last_stage
from megatron_selfdistill.pipeline.token_losses import TokenCoefficients
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.method import Method, MethodTools
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Clip, Signals, Terms, reach_of, signals_of
from megatron_selfdistill.sources.source import StepBatch

WEIGHTS_SHARE = 0.95
"""The share of the sum of the weights that lies below `WEIGHTS_POSITION`."""


def step_coefficients(
    method: Method, tools: MethodTools, step: int, rollouts: Sequence[Rollout], contexts: Sequence[ContextPair]
) -> TokenCoefficients:
    """Return the coefficients of the tokens of ``contexts``, the contexts of these rollouts of this replica.

    They are the method's `Method.terms`, where it weighs tokens, with the correction of loss.rollout_correction, and
    scaled by `Method.token_weights` and for loss.normalize and loss.skip_first_tokens.
    ``step``: the number of optimizer steps before this one.  Revisions and replies (`Rollout.part`) come after all
    responses.
    Collectives: those of a measuring pass where the method needs log-probs of student and target, a sum over the
    data-parallel ranks where loss.normalize is not tokens, and those of `divided_by_sum` where the method says so.
    """
    config, loss, grid = tools.config, tools.config.loss, tools.grid
    by_sequence = loss.rollout_correction == "truncated_sequence" or loss.normalize != "tokens"
    if not (method.weighs_tokens or by_sequence or loss.skip_first_tokens):
        sampled = torch.tensor([x for one in rollouts for x in one.response.sampled_log_probs], dtype=torch.float64)
        return TruncatedImportance(to_device(sampled, grid.device), loss.rollout_correction_cap)
    measured = None
    if config.needs.log_probs in (MEASURED, READ):
        with tools.phases("measure"):
            measured = tools.models.token_signals(contexts)
    signals = signals_of(rollouts, measured)
    if measured is not None and not config.samples_responses:  # nobody sampled the replies: p / mu = 1
        signals = replace(signals, sampled_log_prob=measured["student_log_prob"])
    factors = token_factors(signals, loss.normalize, _totals(config, signals, grid), loss.skip_first_tokens)
    metrics: dict[str, float] = {}
    if method.token_weights is not None:
        weights = method.token_weights(signals)
        if method.divides_by_weights:
            reached, shares = reach_of(signals, config.rollout), factors * signals.per_token(signals.hinted)
            if config.rollout.horizon == "auto":
                metrics[WEIGHTS_POSITION] = position_below(shares * weights, signals.lengths.tolist(), grid)
            weights, about = divided_by_sum(weights, shares, reached, grid)
            metrics |= about
        factors = factors * weights
    on_host = RatioTerms(
        terms=method.terms(step, rollouts, signals).scaled(factors),
        sampled_log_prob=signals.sampled_log_prob,
        target_log_prob=signals.target_log_prob if config.needs.has_ratio else None,
        clip=method.clip,
        correction=_correction(config, signals, grid),
        has_policy_term=config.needs.has_ratio,
        metrics=metrics,
    )
    return to_device(on_host, grid.device)


def _correction(config: Config, signals: Signals, grid: RankGrid) -> TokenCoefficients | None:
    kind, cap = config.loss.rollout_correction, config.loss.rollout_correction_cap
    if kind == "none":
        return None
    if kind == "truncated":
        return TruncatedImportance(signals.sampled_log_prob, cap)
    owners = TokenOwners.of(signals.lengths.tolist(), partial(over_last_stage, grid=grid))
    return SequenceImportance(signals.sampled_log_prob, owners, cap)


def _totals(config: Config, signals: Signals, grid: RankGrid) -> tuple[float, float, float]:
    """Return the numbers of tokens, responses and groups of the global batch, where the loss needs them."""
    counts = len(signals.sampled_log_prob), len(signals.lengths), signals.num_groups
    if config.loss.normalize == "tokens":
        return counts
    num_tokens, num_responses, num_groups = over_replicas(counts, grid)
    return num_tokens, num_responses, num_groups


def token_factors(
    signals: Signals, normalize: str, totals: tuple[float, float, float], skip_first_tokens: int = 0
) -> Tensor:
    """Return the factor [R] of each token's terms in a loss that divides by the number N of response tokens.

    ``totals``: N, the number of responses and the number of groups of the global batch.
    tokens: 1.  sequences: N / (responses * length), the mean over the tokens of each response and then over responses.
    prompts: N / groups, the sum over all tokens and the mean over problems.
    The first ``skip_first_tokens`` tokens of each response have a factor of 0; the divisors still count them.
    """
    num_tokens, num_responses, num_groups = totals
    factors = torch.ones_like(signals.sampled_log_prob)
    if normalize == "sequences":
        factors = num_tokens / num_responses / signals.per_token(signals.lengths).to(factors)
    elif normalize == "prompts":
        factors = factors * (num_tokens / num_groups)
    if skip_first_tokens:
        starts = signals.per_token(signals.lengths.cumsum(0) - signals.lengths)
        place = torch.arange(len(factors), device=factors.device) - starts
        factors = torch.where(place < skip_first_tokens, 0.0, factors)
    return factors


def divided_by_sum(
    weights: Tensor, factors: Tensor, reached: Tensor, grid: RankGrid
) -> tuple[Tensor, dict[str, float]]:
    """Return the ``weights [R]`` divided by their mean over the global batch, and metrics, equal on all ranks.

    ``factors [R]``: how much each token counts without its weight; 0 for a token without a part in the loss.  The sum
    of ``factors * result`` times the losses, divided by the sum of ``factors``, is a mean with the weights
    ``factors * weights``.  Weights that are all 1 stay 1, bit for bit.
    The metrics: weights/mean and reach/mean are the means of ``weights`` and of the reach ``reached [R]``, and
    weights/sum is the sum of ``factors * weights``, the number of tokens that the step counts as.  The result is 0
    where `trains_on_nothing` says so.
    Collectives: one all_gather_object over the data-parallel ranks.
    """
    own = [(factors * values).sum().item() for values in (torch.ones_like(weights), weights, reached)]
    total, weighted, reaching = map(sum, zip(*gather_objects(own, grid.dp_group), strict=True))
    metrics = {"weights/mean": weighted / (total or 1), "reach/mean": reaching / (total or 1), WEIGHTS_SUM: weighted}
    return (torch.zeros_like(weights) if trains_on_nothing(metrics) else weights * (total / weighted)), metrics


def position_below(weights: Tensor, lengths: Sequence[int], grid: RankGrid) -> float:
    """Return the least number of first tokens of a response that has the share `WEIGHTS_SHARE` of all weights.

    ``weights [R]``: those of the tokens of this replica's responses, of ``lengths``; at least 0.  The sums are over the
    global batch, so that the result is equal on all ranks; 0 if all weights are 0.
    Collectives: one all_gather_object over the data-parallel ranks.
    """
    sums = torch.zeros(max(lengths, default=0), dtype=torch.float64)
    for one in weights.double().split(list(lengths)):
        sums[: len(one)] += one
    summed = [sum(column) for column in zip_longest(*gather_objects(sums.tolist(), grid.dp_group), fillvalue=0.0)]
    below = list(accumulate(summed))
    return next((n for n, total in enumerate(below, 1) if 0 < below[-1] * WEIGHTS_SHARE <= total), 0)


def with_metrics_of_weights(batch: StepBatch) -> StepBatch:
    """Return ``batch`` with the metrics of its tokens' weights; without contexts if `trains_on_nothing`.

    A step of batches without contexts has no response token, so that it changes nothing.
    """
    coefficients = batch.token_coefficients
    if not isinstance(coefficients, RatioTerms):
        return batch
    metrics = {**batch.metrics, **coefficients.metrics}
    if not trains_on_nothing(metrics):
        return replace(batch, metrics=metrics)
    batch = replace(batch, contexts=(), solutions=(), sampler_log_probs=None, token_coefficients=None)
    return replace(batch, metrics=metrics)


def clipped_policy(advantage: Tensor, log_ratio: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Return the coefficient a of ``-log p(y)`` in PPO's clipped objective, and whether the clip has made it 0.

    With A = advantage and rho = exp(log_ratio): ``-min(rho A, clip(rho, 1 - clip.low, 1 + clip.high) A)`` has the
    gradient of ``a (-log p)`` with a = rho A, and a = 0 where A > 0 and rho > 1 + clip.high, or A < 0 and
    rho < 1 - clip.low.  A bound of None does not clip.  ``clip.ratio_cap``: the largest rho that multiplies an
    advantage.  All tensors [r].
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; two bounds as in DAPO, Yu et al. 2025 (arXiv
    2503.14476).
    """
    ratio = log_ratio.exp()
    clipped = torch.zeros_like(advantage, dtype=torch.bool)
    if clip.high is not None:
        clipped |= (advantage > 0) & (ratio > 1 + clip.high)
    if clip.low is not None:
        clipped |= (advantage < 0) & (ratio < 1 - clip.low)
    if clip.ratio_cap is not None:
        ratio = ratio.clamp(max=clip.ratio_cap)
    return torch.where(clipped, 0.0, advantage * ratio), clipped


@dataclass(frozen=True)
class RatioTerms:
    """The coefficients of a replica's response tokens: `Terms` with the ratio rho = p / mu of the training pass."""

    terms: Terms
    """The terms of the rule, [R_total] each, on the device of the logits."""
    sampled_log_prob: Tensor
    """log mu of each token, [R_total] float64 nats, on the same device."""
    target_log_prob: Tensor | None
    """log q of each token, [R_total] float64 nats; None if ``terms.sampled_kl`` is 0 everywhere."""
    clip: Clip
    """The bounds of `clipped_policy`, for the advantage alone."""
    correction: Callable[[Tensor, Tensor], Coefficients] | None = None
    """Importance weights that multiply the divergence, as in `TruncatedImportance`; None multiplies it by nothing."""
    has_policy_term: bool = True
    """Whether any token may have a coefficient of -log p; without it the loss has the divergence alone."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the weights of tokens, over the global batch; equal on all ranks."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the coefficients of the tokens ``response_ids [r]``, in the dtype of ``student_log_prob [r]``."""
        with torch.no_grad():
            log_prob = student_log_prob.double()
            log_ratio = log_prob - self.sampled_log_prob[response_ids]
            divergence = self.terms.divergence[response_ids]
            if self.correction is not None:
                divergence = divergence * self.correction(log_prob, response_ids).divergence
            if not self.has_policy_term:
                return Coefficients(divergence.to(student_log_prob))
            policy, clipped = clipped_policy(self.terms.advantage[response_ids], log_ratio, self.clip)
            if self.target_log_prob is not None:
                weight = self.terms.sampled_kl[response_ids] * log_ratio.exp()
                towards = self.target_log_prob[response_ids] - log_prob
                policy = policy + torch.where(weight == 0, 0.0, weight * towards)
            likelihood = self.terms.likelihood[response_ids]
            floor = self.terms.likelihood_floor
            if floor is not None:
                likelihood = torch.where(log_prob < floor[response_ids], 0.0, likelihood)
            policy = policy + likelihood
            return Coefficients(divergence.to(student_log_prob), policy.to(student_log_prob), clipped)
