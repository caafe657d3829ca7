# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""TIP: train on the tokens at which the student is uncertain, or disagrees with its teacher.

Algorithm: The student samples one response per problem. The teacher, which sees the solution, reads it, and a pass
without gradients measures the entropy of the student and the divergence at each token. A token scores high if one of
both is high in comparison with the other tokens of the step. The tokens with the highest scores are trained on.

Equation:

    h = (H - min H) / (max H - min H),   d = (D - min D) / (max D - min D),   s = h + d - h d
    a = 0,   w = N / K for the K tokens with the highest s, else 0
    K = method.share times N, at least 1

H is the student's entropy, and D the divergence of the loss, KL(student || q). Minimum and maximum go over the N tokens
of the step, of all replicas, whose teacher sees a hint. Because of the weight N / K the loss is the mean over the K
tokens.

Paper: TIP, Xu et al. (arXiv 2604.14084), equations 2 to 5, of which the abstract and accounts by others were read, and
the authors' public code, which draws tokens at random with weights H^x D^y in place of the score s. Published are the
score s of the paper's method, shares of .5 and .2, reverse KL to a larger model, 8192 new tokens and a rate of 1e-6.

Differences: Ours are the teacher, which is the frozen weights behind the solution, and the default's length of
responses. Nothing is drawn at random. Tokens with equal scores at the limit are all chosen, so that K may be larger
than the share. The published code needs less memory, as it keeps the logits of chosen tokens alone. Ours projects all
tokens. Any target and divergence go with the score: recipe=default method.name=tip has the default's.

Expected: 100 steps of 32 responses raise the sampled accuracy from .37 to .99 on subtraction and from .57 to .95 on
additions, as `eopd` does, which trains on all tokens (seed 21, the tasks of docs/recipes/comparison.md).

Known failure:
- One token with an extreme divergence moves all others towards d = 0, so that the entropy alone orders them.
- A student that is certain and agrees with its teacher still trains on the share of the tokens: the score is relative.
- The divergence of a teacher that sees the solution is also large where the hint leaks: compare `leak/` metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.method_config import MEASURED, Needs
from megatron_selfdistill.config.schema.ranges import OneOf, Share
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.methods.default import DefaultSettings, SelfDistillation
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms

SOFT_OR, ENTROPY, DIVERGENCE = "soft_or", "entropy", "divergence"


@dataclass(frozen=True)
class TipSettings(DefaultSettings):
    """The settings of TIP."""

    share: Share = 0.5
    """Share of the tokens with a hint that a step trains on, at least one token; with 1 it trains on all of them."""
    score: Annotated[str, OneOf((SOFT_OR, ENTROPY, DIVERGENCE))] = SOFT_OR
    """What orders the tokens: soft_or (the student's entropy or the divergence), entropy or divergence alone."""

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, log_probs=MEASURED)


class Tip(SelfDistillation):
    """Self-distillation on a share of the tokens, chosen by entropy and divergence."""

    Settings = TipSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the divergence with a weight for the chosen tokens of the responses with a hint.

        Collectives: one all_gather_object over the data-parallel ranks.
        """
        entropy, divergence = signals.student_entropy, signals.divergence
        assert entropy is not None and divergence is not None, "the method needs a measuring pass"
        hinted, grid = signals.per_token(signals.hinted), self.tools.grid
        parts = gather_objects(torch.stack([entropy, divergence])[:, hinted], grid.dp_group)
        weights = importance_weights(*torch.cat(parts, 1), share=self.settings.share, score=self.settings.score)
        own = weights.split([part.shape[1] for part in parts])[grid.dp_rank]
        return Terms.of(entropy, divergence=torch.zeros_like(entropy).masked_scatter(hinted, own))


def importance_weights(entropy: Tensor, divergence: Tensor, *, share: float, score: str = SOFT_OR) -> Tensor:
    """Return the weight of each of N tokens, [N] float64: N / K for the K tokens that are chosen, else 0.

    ``entropy``, ``divergence``: H(p) and D(p, q) of each token, [N] float64 nats.  The tokens whose `importance` is at
    least that of the ``share`` N-th highest are chosen, rounded down to at least one token.
    """
    if not len(entropy):
        return torch.zeros_like(entropy)
    found = importance(entropy, divergence, score)
    limit = found.topk(max(1, int(share * len(found)))).values[-1]
    chosen = (found >= limit).to(entropy)
    return chosen * (len(chosen) / chosen.sum())


def importance(entropy: Tensor, divergence: Tensor, score: str) -> Tensor:
    """Return the score of each token, [N] from 0 to 1: ``h + d - h d``, or h or d alone.

    h and d are the tokens' places between the smallest and the largest entropy and divergence.
    """
    h, d = _place(entropy), _place(divergence)
    return {SOFT_OR: h + d - h * d, ENTROPY: h, DIVERGENCE: d}[score]


def _place(values: Tensor) -> Tensor:
    """Return (values - min) / (max - min) over the finite values, 0 if all are equal; infinity is 1."""
    finite = values[values.isfinite()]
    if not len(finite):
        return values.clamp(0, 1)
    low, high = finite.aminmax()
    places = (values - low) / (high - low) if high > low else values - low
    return places.clamp(0, 1)
