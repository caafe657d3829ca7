# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The limits of the guards: a metric, the side of its reference on which it stays, and the message beyond it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.config import GuardsConfig

LOSS = "loss/mean"
"""The metric whose rise `GuardsConfig.max_loss_ratio` bounds."""
LOOPS = "response/loop_share"
"""The metric of the share of responses that end in a loop."""
LOSS_RISE = 0.1
"""The smallest rise of the loss, in nats per token, for which guards.max_loss_ratio stops a run."""


@dataclass(frozen=True)
class Limit:
    """A limit: ``metrics[key]`` must stay on one side of ``ratio`` times its reference."""

    name: str
    key: str
    option: str
    ratio: float
    advice: str
    is_minimum: bool = True
    slack: float = 0.0
    """The distance from the reference, in the metric's unit, that never violates a maximum."""

    def violated(self, value: float, reference: float) -> bool:
        """Return whether ``value`` is beyond the limit for this ``reference``."""
        if self.is_minimum:
            return not value >= self.ratio * reference  # NaN violates the limit
        return not value <= max(self.ratio * reference, reference + self.slack)

    def message(self, in_a_row: int, value: float, reference: float, count: int) -> str:
        """Return why a run ends after ``in_a_row`` violations; ``reference``: the mean of ``count`` first values."""
        side = "below" if self.is_minimum else "above"
        bound = f"its reference plus {self.slack:g}" if self.ratio == 1 else f"{self.ratio:g} times its reference"
        first = "its first value" if count == 1 else f"its mean over the first {count} steps"
        return (
            f"{self.name}: {self.key} has been {side} {bound} for {in_a_row} steps; it is {value:.4g}, and {first} was "
            f"{reference:.4g}; {self.advice} (guards.{self.option}=null turns this guard off)"
        )


def limits_of(config: GuardsConfig, loss_should_fall: bool, student_samples: bool) -> list[Limit]:
    """Return the limits that the configuration sets."""
    entropy, key = config.entropy, "entropy/student"
    steps_too_large = "the steps are too large: lower optimizer.lr, or raise optimizer.lr_warmup_steps"
    certain = "the student has become certain of nearly every token: lower optimizer.lr or teacher_weight"
    defaults = "use the defaults (reverse KL, k_max = 1 + w, a frozen teacher and reference), or lower optimizer.lr"
    no_work = (
        "responses no longer show their work: read some responses, and change data.teacher_template or the teacher"
    )
    earlier = "read the samples, and resume from an earlier checkpoint with a lower optimizer.lr"
    limits = []
    if loss_should_fall and (most := config.max_loss_ratio) is not None:
        limits.append(Limit("loss explosion", LOSS, "max_loss_ratio", most, steps_too_large, False, LOSS_RISE))
    if (least := entropy.min_ratio) is not None:
        limits.append(Limit("entropy collapse", key, "entropy.min_ratio", least, certain))
    if (most := entropy.max_ratio) is not None:
        limits.append(Limit("entropy explosion", key, "entropy.max_ratio", most, defaults, False, entropy.min_rise))
    if (least := config.min_length_ratio) is not None:
        limits.append(Limit("length collapse", "response/length_mean", "min_length_ratio", least, no_work))
    if student_samples and (rise := config.max_loop_rise) is not None:
        limits.append(Limit("loops", LOOPS, "max_loop_rise", 1.0, earlier, False, rise))
    return limits
