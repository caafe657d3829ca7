# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PW-OPSD: the divergence from the teacher, with a smaller weight for the first tokens of a response.

Algorithm: The student samples one response per problem. The teacher, which sees the solution, reads it. Every token has
the divergence of its position times a weight that rises along the response, because the teacher is less reliable early.

Equation:

    a = 0,   w_i = least + (1 - least) sigmoid( ((i - 1/2) / n - midpoint) / width )
    i = 1 ... n is the number of the token in its response, and n is the length of the response

least is method.least_weight, and midpoint and width are the settings of these names.

Paper: PW-OPSD, Liu et al. (arXiv 2605.21606); formula and constants are those of the authors' code. On Qwen3-4B a score
of the position tells reliable tokens of the teacher with an AUROC of .83, and scores of the entropy with at most .57.
Published are the moderate weights (.25, .3, .1), forward KL to the frozen teacher, the mean over the tokens of a
response and then over responses, 1024 new tokens, the learning rate (with LoRA of rank 64), and the use of step 100.

Differences: As for `opsd`, the temperature of 1.1 and the clamp of the divergence at .05 are not taken over. In an
environment of several turns, the position is that within the response of a turn. Any target and divergence go with the
weights: recipe=default method.name=pw_opsd weighs the default.

Expected: 100 steps of 32 responses raise the sampled accuracy from .37 to .47 on subtraction (`opsd`: .56) and from .57
to .95 on additions (`opsd`: .94). Under the default's target the weights change nothing: .97 and .90 with and without
them (seed 21, the tasks of docs/recipes/comparison.md).

Known failure:
- The weights depend on the length alone. A response that restarts has small weights at the wrong tokens, and of a
  truncated response nobody knows the true length.
- The mean of the published weights is .77, so that the gradient is shorter than without weights.
- With another model as the teacher, a study reports the opposite: later tokens are less reliable (arXiv 2606.22600).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.method_config import Needs
from megatron_selfdistill.config.schema.ranges import PositiveFloat, Share
from megatron_selfdistill.methods.default import DefaultSettings, SelfDistillation
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class PwOpsdSettings(DefaultSettings):
    """The settings of PW-OPSD."""

    least_weight: Share = 0.25
    """Weight far before the midpoint; far behind it the weight is 1.  With 1, every token has the weight 1."""
    midpoint: Share = 0.3
    """Position in the response, as a share of its length, at which the weight is halfway between both."""
    width: PositiveFloat = 0.1
    """Share of the response in which the weight rises: the scale of the sigmoid."""

    @property
    def needs(self) -> Needs:
        """What the method needs from the core: the length of a response decides its weights."""
        return replace(super().needs, whole=True)


class PwOpsd(SelfDistillation):
    """Position-weighted self-distillation."""

    Settings = PwOpsdSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the divergence with the weight of each position, for the tokens of each response with a hint."""
        own = self.settings
        weights = position_weights(signals, least=own.least_weight, midpoint=own.midpoint, width=own.width)
        return super().terms(step, rollouts, signals).scaled(weights)


def position_weights(signals: Signals, *, least: float, midpoint: float, width: float) -> Tensor:
    """Return the weight [R] float64 of each token: ``least + (1 - least) sigmoid((x - midpoint) / width)``.

    x: the middle of the token in its response, (i - 1/2) / n for token i = 1 ... n, so that 0 < x < 1.
    """
    starts = signals.per_token(signals.lengths.cumsum(0) - signals.lengths)
    place = torch.arange(len(starts), device=starts.device) - starts
    middle = (place.double() + 0.5) / signals.per_token(signals.lengths)
    return least + (1 - least) * ((middle - midpoint) / width).sigmoid()
