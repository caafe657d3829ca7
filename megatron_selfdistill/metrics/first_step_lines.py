# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first step says of the run, in lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_selfdistill.config import Config, method_class

if TYPE_CHECKING:  # the metrics of a run are also read without Megatron
    pass


LITTLE_CHANGE = 0.01
"""The change of what a layer computes, relative to its size, below which a run learns nothing that shows.  A run of
`docs/real_model.md` that learns its instruction in ten steps has .06, and the default learning rate there has .003."""


def first_step_lines(config: Config, metrics: Mapping[str, float]) -> list[str]:
    """Return what the first step shows: where the rewards come from and their mean, and steps that are too small."""
    lines, steps, lr = [], config.num_steps, config.optimizer.lr
    # The rewards of an environment, and those of a method with a hook of its own, are none of a verifier.
    hook = method_class(config.method.name).rewarded.__qualname__
    if config.needs.rewards and hook == "SelfDistillation.rewarded" and not config.environment.exists:
        reward, mean = getattr(config.method, "reward", None), metrics.get("rewards/mean", math.nan)
        judge = f"evaluation.verifier={config.evaluation.verifier}" if reward is None else f"method.reward={reward}"
        lines.append(f"rewards: {judge}; {mean:.2f} {'of the responses are right' if reward is None else 'on average'}")
    if 0 < (change := largest_change(config)) < LITTLE_CHANGE:
        norm, factor = metrics.get("gradient_norm", math.nan), LITTLE_CHANGE / change
        lines.append(
            f"warning: optimizer.lr={lr:g} is small for {steps} steps: Adam moves a weight by at most this much per "
            f"step, whatever the gradient (its norm is {norm:.2g}), so that the run changes what a layer computes by "
            f"at most {change:.2%}, expected at least {LITTLE_CHANGE:.0%}: nothing will be learned; try "
            f"optimizer.lr={10 * lr * factor:.0e}, or num_steps above {math.ceil(steps * factor)}"
        )
    return lines


def largest_change(config: Config) -> float:
    """Return the largest relative change of what a layer computes over all steps of a run.

    Adam moves each element of a weight by about lr per step, whatever the size of its gradient.  If all N steps point
    the same way, the spectral norm of the change of a d x d matrix is at most N lr d, while that of random elements
    with the standard deviation s is 2 s sqrt(d).  The ratio is N lr sqrt(d) / (2 s).
    It is infinite for SGD, whose steps have no bound, and for adapters, one of whose factors begins at 0.
    """
    model, optimizer = config.model, config.optimizer
    if optimizer.optimizer != "adam" or config.adapter.rank or not model.init_method_std:
        return math.inf
    return config.num_steps * optimizer.lr * math.sqrt(model.hidden_size) / (2 * model.init_method_std)
