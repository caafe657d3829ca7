# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation beside rewards: the teacher's part and the part of rewards in one loss.

Algorithm: The method maximises E[reward] - beta KL(student || teacher), where the teacher is the current student that
sees the solution. The teacher tilted by the reward is the optimum. With method.weight=0 only the teacher's part stays,
in the form of method.signal.

Equation:

    w = beta = .25,   a = A rho with the clip of PPO (see grpo)
    D = KL(student || teacher) over the whole vocabulary

beta is method.distill_weight, and the weight of A is method.weight.

Paper: Penaloza et al. (arXiv 2602.04942). Published are the objective, and that the current weights are the teacher.

Differences: Ours are beta = .25 (published for a related method, second-hand), 8 responses, and the advantages and the
clip of GRPO.

Expected: 100 steps of 4 x 8 responses raise the sampled accuracy from .36 to .84 on subtraction and from .51 to .92 on
additions (docs/recipes/comparison.md).

Known failure:
- It is reported to be competitive in some settings only.
- A hint that leaks is learned, as by every teacher that is not mixed: target=capped target.anchor=reference
  teacher.weights=frozen holds it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.methods.default import SelfDistillation
from megatron_selfdistill.methods.parts.settings import DistillAndRewardSettings
from megatron_selfdistill.methods.parts.terms import uniform, with_rewards
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


class OpsdRl(SelfDistillation):
    """Self-distillation beside rewards."""

    Settings: ClassVar[type[MethodSettings]] = DistillAndRewardSettings

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the teacher's part plus the advantages of the rewards."""
        own = self.settings
        return with_rewards(uniform(signals, weight=own.distill_weight, signal=own.signal), signals, own)
