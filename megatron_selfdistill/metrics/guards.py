# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The guards of a run: infinite numbers and NaN, engines that disagree, a student that collapses or repeats itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report reads `ENTROPY_RISE`, and answers without the libraries of the configuration
    from megatron_selfdistill.config.schema.run_config import GuardsConfig

LOSS = "loss/mean"
"""The metric whose rise `GuardsConfig.max_loss_ratio` bounds."""
LOOPS = "response/loop_share"
"""The metric of the share of responses that end in a loop."""
TRUNCATED = "response/truncated_share"
"""The metric of the share of responses that are cut at rollout.max_new_tokens; no metric where any is unfinished."""
UNFINISHED = "response/unfinished_share"
"""The metric of the share of responses that end at the horizon of their step; no metric where none does."""
LENGTH = "response/length_mean"
"""The metric of the mean length of responses, as far as they were sampled."""
WEIGHTS_SUM, WEIGHTS_POSITION = "weights/sum", "weights/position_95"
"""The metrics of the sum of the weights of tokens, and of the first tokens on which 95 % of the sum lie; no metrics
where the weights have no name."""
LOSS_RISE, ENTROPY_RISE = 0.1, 0.05
"""The smallest rises of the loss and of the entropy, in nats per token, for which guards.max_loss_ratio and
guards.entropy.max_ratio stop a run: a tiny reference alone does not."""
DISTANCE = "sampler/log_prob_mean_abs_diff"
"""The metric that compares the log-probs of the engine and the trainer over all sampled tokens."""
WORST = "sampler/log_prob_worst_response"
"""The same for the response that differs most, in which one wrong engine among many shows."""
WARNED_DISTANCE = 0.1
"""The distance in nats per token above which a run warns; rounding in bf16 makes a tenth of it."""
MANY_LOOPS = 0.1
"""The share of responses that end in a loop above which a first step warns, and the rise of the share that warns later.
"""


class RunUnhealthy(RuntimeError):
    """The error that stops an unhealthy run; its message names the value, the expectation and where to look."""


def trains_on_nothing(metrics: Mapping[str, float]) -> bool:
    """Return whether a step with these metrics has weights whose sum is below one token, and so changes nothing.

    A step divides by the sum, so that few tokens with tiny weights would otherwise make a step of full length.
    """
    return metrics.get(WEIGHTS_SUM, 1.0) < 1


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


def limits_of(config: GuardsConfig, loss_should_fall: bool, student_samples: bool, judges_loops: bool) -> list[Limit]:
    """Return the limits that the configuration sets."""
    entropy, key = config.entropy, "entropy/student"
    steps_too_large = "the steps are too large: lower optimizer.lr, or raise optimizer.lr_warmup_steps"
    certain = "the student has become certain of nearly every token: lower optimizer.lr or teacher_weight"
    defaults = "use the defaults (reverse KL, k_max = 1 + w, a frozen teacher and reference), or lower optimizer.lr"
    no_work = (
        "responses no longer show their work: read some responses, and change data.teacher_template or the teacher"
    )
    earlier = "read the samples, and resume from an earlier checkpoint with a lower optimizer.lr"
    no_end = f"raise rollout.max_new_tokens if responses have only grown, or else {earlier}"
    limits = []
    if loss_should_fall and (most := config.max_loss_ratio) is not None:
        limits.append(Limit("loss explosion", LOSS, "max_loss_ratio", most, steps_too_large, False, LOSS_RISE))
    if (least := entropy.min_ratio) is not None:
        limits.append(Limit("entropy collapse", key, "entropy.min_ratio", least, certain))
    if (most := entropy.max_ratio) is not None:
        limits.append(Limit("entropy explosion", key, "entropy.max_ratio", most, defaults, False, ENTROPY_RISE))
    if (least := config.min_length_ratio) is not None:
        limits.append(Limit("length collapse", LENGTH, "min_length_ratio", least, no_work))
    if judges_loops and (rise := config.max_loop_rise) is not None:
        limits.append(Limit("loops", LOOPS, "max_loop_rise", 1.0, earlier, False, rise))
    if student_samples and (rise := config.max_truncated_rise) is not None:
        limits.append(Limit("responses without an end", TRUNCATED, "max_truncated_rise", 1.0, no_end, False, rise))
    return limits


class Guards:
    """The comparison of every step's metrics with their means over the first ``reference_steps`` steps.

    The guards read loss/mean, gradient_norm, `DISTANCE`, `WORST`, entropy/student, `LENGTH`, `UNFINISHED`, `LOOPS` and
    `TRUNCATED`; a guard is silent if the run does not have its metric.  All ranks get the same metrics, so all ranks
    raise at the same step.
    An unfinished response is not misjudged.  It counts as at least as long as the reference, and a step that has one
    has no `TRUNCATED`.  A text that repeats itself at the horizon is a loop, but longer texts have more loops: where
    the horizon changes from step to step, no rise of `LOOPS` is judged.
    `warnings` reads `DISTANCE` and `LOOPS`, and stops no run.
    """

    def __init__(
        self,
        config: GuardsConfig,
        engines: str | None = None,
        *,
        loss_should_fall: bool = False,
        student_samples: bool = False,
        has_one_horizon: bool = True,
    ) -> None:
        """Make the guards of a run; ``engines``: the engines that sample its responses, as a message names them.

        Without ``engines`` the responses come from elsewhere, and their distance from the trainer is not judged.
        ``loss_should_fall``: whether the loss is a divergence that nothing but training changes, so that its rise is
        judged.  ``student_samples``: whether the student samples the responses, so that a rise of their loops, or of
        those that are cut, is judged.  ``has_one_horizon``: whether the responses of all steps may be equally long.
        """
        self.config, self.engines, self.judges_loops = config, engines, student_samples and has_one_horizon
        self.has_warned: set[str] = set()
        """The metrics of which this launch has warned."""
        self.limits = limits_of(config, loss_should_fall, student_samples, self.judges_loops)
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.violations: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the metrics of a finished step.

        Raises: `RunUnhealthy` at once for a value that is not finite (`check_finite`), or at the ``patience``-th
        consecutive step that violates a limit.  The first ``reference_steps`` finite values of a metric are its
        reference and are not judged; after these values, NaN violates every limit on the metric.  The loss has one
        value as its reference, since only the first step has the weights at which the run starts.  The distance
        between the engines and the trainer needs no reference, so that its first value is judged.
        """
        self.check_finite(step, metrics)
        self._judge_distance(step, metrics)
        judged = [limit.key for limit in self.limits] + [LOOPS] * self.judges_loops  # `warnings` reads its reference
        for key in dict.fromkeys(judged):
            if key not in metrics:
                continue
            if self.counts.get(key, 0) < (1 if key == LOSS else self.config.reference_steps):
                if math.isfinite(metrics[key]):
                    self.sums[key] = self.sums.get(key, 0.0) + metrics[key]
                    self.counts[key] = self.counts.get(key, 0) + 1
            else:
                for limit in self.limits:
                    if limit.key == key:
                        self._judge(step, limit, metrics)

    def check_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise `RunUnhealthy` if loss/mean or gradient_norm is NaN or infinite (option non_finite).

        The trainer calls this method before the optimizer step, with the metrics that are known by then, so that the
        weights stay intact.
        """
        for key in (LOSS, "gradient_norm"):
            if self.config.non_finite and not math.isfinite(metrics.get(key, 0.0)):
                raise RunUnhealthy(
                    f"step {step}: expected a finite {key}, got {metrics[key]}; look at the steps before "
                    "it in metrics.jsonl, and resume with a lower optimizer.lr or optimizer.precision=fp32 "
                    "(guards.non_finite=false continues regardless)"
                )

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Return what the metrics of a finished step warn of, each warning once a launch.

        The engines and the trainer compute log-probs that differ by more than `WARNED_DISTANCE`; or, for ``patience``
        steps in a row, more responses end in a loop than over the first ``reference_steps`` steps, by `MANY_LOOPS`.
        Call this method once for every step, before `check`, which takes the reference.
        """
        found = {DISTANCE: self._warning_of_the_distance(metrics), LOOPS: self._warning_of_loops(metrics)}
        new = {key: text for key, text in found.items() if text is not None and key not in self.has_warned}
        self.has_warned |= new.keys()
        return [f"warning: {text}" for text in new.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the references and counters, with which a resumed run guards as if it had never stopped."""
        return {"sums": dict(self.sums), "counts": dict(self.counts), "violations": dict(self.violations)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the references and counters of `state_dict`; limits and patience come from the configuration."""
        self.sums, self.counts, self.violations = (dict(state[name]) for name in ("sums", "counts", "violations"))

    def _warning_of_the_distance(self, metrics: Mapping[str, float]) -> str | None:
        distance = metrics.get(DISTANCE, 0.0)
        if self.engines is None or self.config.max_log_prob_distance is None or distance <= WARNED_DISTANCE:
            return None
        return self._disagreement(f"differ by {distance:.3g} nats on average, expected at most {WARNED_DISTANCE:g}")

    def _warning_of_loops(self, metrics: Mapping[str, float]) -> str | None:
        if not self.judges_loops or LOOPS not in metrics:
            return None
        share, count = metrics[LOOPS], self.counts.get(LOOPS, 0)
        if count < self.config.reference_steps:
            return None
        first = self.sums[LOOPS] / count
        in_a_row = self._in_a_row(LOOPS, share > first + MANY_LOOPS)
        if in_a_row < self.config.patience:
            return None
        return (
            f"more responses end in a loop than at the start: expected a {LOOPS} of at most {first + MANY_LOOPS:.2f} "
            f"({MANY_LOOPS:g} above the mean of the first {count} steps), got {share:.2f} after {in_a_row} such steps; "
            "read the samples, and resume from a checkpoint before the rise with a lower optimizer.lr; a larger "
            "rollout.max_new_tokens only makes the loops longer"
        )

    def _judge_distance(self, step: int, metrics: Mapping[str, float]) -> None:
        largest = self.config.max_log_prob_distance
        if self.engines is None or largest is None:
            return
        for key, average, option in (
            (DISTANCE, "on average", "max_log_prob_distance"),
            (WORST, "on average over one response", "max_log_prob_distance of a response"),
        ):
            if key not in metrics:
                continue
            in_a_row = self._in_a_row(option, not metrics[key] <= largest)  # NaN is too large
            if in_a_row >= self.config.patience:
                above = f"more than {largest:g} nats {average} for {in_a_row} steps"
                how = self._disagreement(f"have differed by {above}, now by {metrics[key]:.3g}", key)
                raise RunUnhealthy(f"step {step}: {how} (guards.max_log_prob_distance=null turns this guard off)")

    def _disagreement(self, how: str, key: str = DISTANCE) -> str:
        return (
            f"the log-probs that {self.engines} and the trainer give the sampled tokens {how} ({key}): the engine "
            "has old weights, or another model, tokenizer or precision than the trainer; compare its version and its "
            "config.json with those of the run, and start it anew; if responses have older weights, lower "
            "rollout.max_staleness or optimizer.lr"
        )

    def _in_a_row(self, option: str, violated: bool) -> int:
        """Count a step that violates the limit of ``option``, or one that does not; return the present count."""
        self.violations[option] = self.violations.get(option, 0) + 1 if violated else 0
        return self.violations[option]

    def _judge(self, step: int, limit: Limit, metrics: Mapping[str, float]) -> None:
        value, reference = metrics[limit.key], self.sums[limit.key] / self.counts[limit.key]
        unseen = metrics.get(UNFINISHED, 0.0) * reference if limit.key == LENGTH else 0.0
        in_a_row = self._in_a_row(limit.option, limit.violated(value + unseen, reference))
        if in_a_row >= self.config.patience:
            raise RunUnhealthy(f"step {step}: {limit.message(in_a_row, value, reference, self.counts[limit.key])}")
