# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The coefficients of response tokens in the loss; they are constants, through which no gradient flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """The coefficients w and a of R response tokens, each of whose losses is ``w D(p, q) + a (-log p(token))``.

    The first term distils the whole distribution q of the target; the second term raises (a > 0) or lowers (a < 0) the
    probability of the response token, as policy gradients and likelihood do.  Both coefficients are constants.
    """

    divergence: Tensor
    """[R] w >= 0."""
    policy: Tensor | None = None
    """[R] a, of either sign; None if there is no second term: for all microbatches of a step, or for none."""
    clipped: Tensor | None = None
    """[R] bool: whether a clip has set a to 0; None if nothing is clipped."""

    @classmethod
    def concatenate(cls, parts: Sequence[Coefficients]) -> Coefficients:
        """Return the coefficients of the tokens of all parts, at least one, in their order.

        Raises: ValueError if only some of the parts have ``policy``, or only some have ``clipped``.
        """

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            known = [value for value in values if value is not None]
            if known and len(known) != len(values):
                raise ValueError(
                    f"Coefficients.{name} must be given for all microbatches of a step or for none; got it for "
                    f"{len(known)} of {len(values)}."
                )
            return torch.cat(known) if known else None

        return cls(torch.cat([part.divergence for part in parts]), joined("policy"), joined("clipped"))

    def token_losses(self, divergence: Tensor, log_prob: Tensor) -> Tensor:
        """Return ``w D - a log p(token)`` [R] of every response token.

        divergence: [R] D(p, q); log_prob: [R] log p of the tokens; both in nats, and a gradient flows to both.
        A token with a = 0 has no second term, also where its log-prob is -inf or NaN.
        """
        losses = divergence * self.divergence
        if self.policy is None:
            return losses
        return losses - torch.where(self.policy == 0, 0.0, self.policy * log_prob)


@dataclass(frozen=True)
class TruncatedImportance:
    """Truncated importance weights ``min(p / mu, cap)``, one per token.

    p is the student's probability of the token at temperature 1, and mu its probability under the distribution that
    sampled it.
    mu differs from p where another engine sampled with other kernels, where a temperature or a cut changed the
    distribution, and where the target sampled the response.
    Source: truncated importance sampling, Ionides 2008 (doi 10.1198/106186008X320456); per token, as in Espeholt et al.
    2018 (arXiv 1802.01561), equation 1.
    """

    sampled_log_probs: Tensor
    """[R_total] nats: log mu of every response token of this replica, in the order of ``PackedBatch.response_tokens``;
    on the device of the logits, so that no microbatch waits for a copy."""
    cap: float = 2.0
    """The largest weight."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the weight [R] of every response token as the coefficient of its divergence.

        student_log_prob: [R] nats, log p of the tokens; response_ids: [R], their indices among the replica's response
        tokens.
        """
        sampled = self.sampled_log_probs[response_ids].to(student_log_prob)
        with torch.no_grad():
            return Coefficients((student_log_prob - sampled).exp().clamp(max=self.cap))


@dataclass(frozen=True)
class TokenOwners:
    """The response that each response token of this replica belongs to."""

    ids: Tensor
    """[R_total] int64: the index of the token's response among those of the replica, in the order of
    ``PackedBatch.response_tokens``; on the device of the logits.  All tokens of a response lie in one microbatch."""
    num_responses: int
    over_ranks: Callable[[Tensor], Tensor]
    """The sum over the ranks that hold tokens of the same responses, with the same bits on all of these ranks, so that
    all of them decide alike."""

    @classmethod
    def of(cls, lengths: Sequence[int], over_ranks: Callable[[Tensor], Tensor]) -> TokenOwners:
        """Return the owners of the tokens of responses of these ``lengths``, on the host."""
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return cls(ids, len(lengths), over_ranks)

    def means(self, values: Tensor, response_ids: Tensor) -> Tensor:
        """Return the mean of ``values`` over the response of each token, [R] float64.

        values: [R], one per token; response_ids: [R], the indices of the tokens among the replica's response tokens.
        Collectives: `over_ranks`, once.
        """
        owners = self.ids[response_ids]
        sums = torch.zeros(2, self.num_responses, dtype=torch.float64, device=values.device)
        sums[0].index_add_(0, owners, values.double())
        sums[1].index_add_(0, owners, torch.ones_like(values, dtype=torch.float64))
        total, count = self.over_ranks(sums)
        means: Tensor = total / count.clamp(min=1)
        return means[owners]


@dataclass(frozen=True)
class SequenceImportance:
    """Truncated importance weights ``min(mean of p / mu over the response, cap)``, the same for a response's tokens."""

    sampled_log_probs: Tensor
    """[R_total] nats: log mu, as for `TruncatedImportance`."""
    owners: TokenOwners
    cap: float = 2.0
    """The largest weight."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the weight [R] of every response token as the coefficient of its divergence.

        Arguments: as for `TruncatedImportance`.  Collectives: those of `TokenOwners.means`.
        """
        with torch.no_grad():
            ratios = (student_log_prob.double() - self.sampled_log_probs[response_ids].double()).exp()
            return Coefficients(self.owners.means(ratios, response_ids).clamp(max=self.cap).to(student_log_prob))


@dataclass(frozen=True)
class SharedTokens:
    """Other coefficients, or none, times a factor per token: the share of one of several teachers."""

    factors: Tensor
    """[R_total] float64, at least 0, in the order of ``PackedBatch.response_tokens``, on the device."""
    inner: Callable[[Tensor, Tensor], Coefficients] | None = None
    """The coefficients without the factors, without a policy term; None is 1 for every token."""

    def __call__(self, student_log_prob: Tensor, response_ids: Tensor) -> Coefficients:
        """Return the weight [R] of every response token as the coefficient of its divergence.

        Arguments: as for `TruncatedImportance`.  Collectives: those of ``inner``.
        """
        with torch.no_grad():
            factors = self.factors[response_ids].to(student_log_prob)
            if self.inner is None:
                return Coefficients(factors)
            inner = self.inner(student_log_prob, response_ids)
            assert inner.policy is None, "several teachers are for methods without a policy term"
            return Coefficients(inner.divergence * factors, clipped=inner.clipped)
