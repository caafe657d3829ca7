# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules by which a figure of a report is sick, as functions of a run.

A rule compares the values at the end of a curve with a limit, and calls the figure sick since the first of them.  A
single odd value is not enough: `IN_A_ROW` values of steps must agree, while one evaluation is enough.  A value that is
not finite violates every limit.  The first value of a curve is the median of its first `FIRST` values; a curve of
evaluations has too few for a median.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

from megatron_selfdistill.instruments.report.run_record import RunRecord, limits
from megatron_selfdistill.run_log import finite

Value = TypeVar("Value")
Rule = Callable[[RunRecord], int | None]
"""Returns the step since which a run is sick; None if the run is not sick, or if its values cannot tell yet."""

FIRST = 5
IN_A_ROW = 3
FALL = 0.02
"""The change of an accuracy that counts as a change."""


def above(key: str, limit: float, in_a_row: float = IN_A_ROW) -> Rule:
    """Return the rule that the metric is above ``limit``."""
    return lambda run: _at_the_end(key, *_curve(run, key), lambda value: not value <= limit, in_a_row)


def below(key: str, limit: float, in_a_row: float = IN_A_ROW) -> Rule:
    """Return the rule that the metric is below ``limit``."""
    return lambda run: _at_the_end(key, *_curve(run, key), lambda value: not value >= limit, in_a_row)


def rises(key: str, *, ratio: float = 1.0, by: float = 0.0, skip: int = 0) -> Rule:
    """Return the rule that the metric is above ``ratio`` times its first value, and above that value by ``by``.

    ``skip``: the number of values before the first value that counts.
    """

    def rule(run: RunRecord) -> int | None:
        first = _first(run, key, skip)
        return None if first is None else above(key, max(ratio * first, first + by))(run)

    return rule


def falls(key: str, *, ratio: float = 1.0, by: float = 0.0, skip: int = 0) -> Rule:
    """Return the rule that the metric is below ``ratio`` times its first value, and below that value by ``by``."""

    def rule(run: RunRecord) -> int | None:
        first = _first(run, key, skip)
        return None if first is None else below(key, min(ratio * first, first - by))(run)

    return rule


def falls_again(key: str) -> Rule:
    """Return the rule that a share is a tenth, and `FALL`, below its largest value before."""

    def rule(run: RunRecord) -> int | None:
        steps, values = _curve(run, key)
        best = [max(values[: i + 1]) for i in range(len(values))]
        return _at_the_end(key, steps, list(zip(values, best, strict=True)), lambda at: at[0] < 0.9 * at[1] - FALL)

    return rule


def starts_above(key: str, limit: float) -> Rule:
    """Return the rule that the first value of the metric is above ``limit``."""
    return lambda run: next((step for step, value in _pairs(run, key)[:1] if value > limit), None)


def starts_below(key: str, limit: float) -> Rule:
    """Return the rule that the first value of the metric is below ``limit``."""
    return lambda run: next((step for step, value in _pairs(run, key)[:1] if value < limit), None)


def once_above(key: str, limit: float) -> Rule:
    """Return the rule that any value of the metric is above ``limit``."""
    return lambda run: next((step for step, value in _pairs(run, key) if value > limit), None)


def never_above(key: str, limit: float) -> Rule:
    """Return the rule that no value of the metric is above ``limit``."""

    def rule(run: RunRecord) -> int | None:
        steps, values = _curve(run, key)
        return steps[0] if len(values) >= IN_A_ROW and max(values) <= limit else None

    return rule


def flat(key: str, window: int = 10) -> Rule:
    """Return the rule that the means of the first and of the last ``window`` values differ by chance only.

    The bound is twice the standard error of the difference.  Runs of fewer than three windows are not judged.
    """

    def rule(run: RunRecord) -> int | None:
        values = run.values(key)
        if len(values) < 3 * window:
            return None
        (first, one), (last, two) = _mean_and_variance(values[:window]), _mean_and_variance(values[-window:])
        return _curve(run, key)[0][0] if abs(first - last) <= 2 * math.sqrt((one + two) / window) else None

    return rule


def above_other(key: str, other: str, *, ratio: float = 1.0, by: float = 0.0) -> Rule:
    """Return the rule that the metric is above ``ratio`` times another metric, and above this product by ``by``."""

    def rule(run: RunRecord) -> int | None:
        others = dict(_pairs(run, other))
        both = [(step, (value, others[step])) for step, value in _pairs(run, key) if step in others]
        return _at_the_end(
            key, [step for step, _ in both], [at for _, at in both], lambda at: at[0] > ratio * at[1] + by
        )

    return rule


def not_above_at_first(key: str, other: str) -> Rule:
    """Return the rule that an accuracy exceeds another accuracy by less than `FALL` at the first step with both."""

    def rule(run: RunRecord) -> int | None:
        others = dict(_pairs(run, other))
        both = [step for step, _ in _pairs(run, key) if step in others]
        return both[0] if both and dict(_pairs(run, key))[both[0]] < others[both[0]] + FALL else None

    return rule


def only_part(key: str, keys: Sequence[str], share: float = 0.95, least: float = 1e-3) -> Rule:
    """Return the rule that the metric has ``share`` of the sum of ``keys``, where this sum is at least ``least``."""

    def rule(run: RunRecord) -> int | None:
        curves = [dict(_pairs(run, name)) for name in keys]
        at = [(step, (value, sum(of.get(step, 0.0) for of in curves))) for step, value in _pairs(run, key)]
        return _at_the_end(
            key, [step for step, _ in at], [both for _, both in at], lambda of: of[0] > share * of[1] and of[1] >= least
        )

    return rule


def any_of(*rules: Rule) -> Rule:
    """Return the rule that one of ``rules`` applies, since the first of them does."""

    def rule(run: RunRecord) -> int | None:
        return min((since for since in (one(run) for one in rules) if since is not None), default=None)

    return rule


def all_of(*rules: Rule) -> Rule:
    """Return the rule that all ``rules`` apply, since the last of them does."""

    def rule(run: RunRecord) -> int | None:
        found = [since for since in (one(run) for one in rules) if since is not None]
        return max(found) if len(found) == len(rules) else None

    return rule


def unless(rule: Rule, other: Rule) -> Rule:
    """Return the rule that ``rule`` applies and ``other`` does not."""
    return lambda run: rule(run) if other(run) is None else None


def configured(key: str, value: object, rule: Rule) -> Rule:
    """Return ``rule`` for runs whose configuration has this value of the key; no other run is sick by it."""
    return lambda run: rule(run) if run.config.get(key) == value else None


def near(metric: str, bound: Callable[[RunRecord], float | None], share: float) -> Rule:
    """Return the rule that the metric is at least ``share`` of ``bound``; a run without a bound is not sick by it."""

    def rule(run: RunRecord) -> int | None:
        limit = bound(run)
        return None if limit is None else _at_the_end(metric, *_curve(run, metric), lambda v: v >= share * limit)

    return rule


def bound_of_k(run: RunRecord) -> float | None:
    """Return the bound of k that the configuration of a run gives; None without a bound."""
    bound, weight = run.config.get("target.k_max"), finite(run.config.get("target.teacher_weight"))
    return finite(bound) if bound != "1 + w" or weight is None else 1 + weight


def bound_of_staleness(run: RunRecord) -> float | None:
    """Return rollout.max_staleness; None below 2, where the age of the weights can be its bound at every step."""
    bound = finite(run.config.get("rollout.max_staleness"))
    return bound if bound is not None and bound >= 2 else None


def beyond_limits(key: str) -> Rule:
    """Return the rule that the metric is beyond a limit of its guards, for guards.patience steps in a row."""

    def rule(run: RunRecord) -> int | None:
        patience = finite(run.config.get("guards.patience")) or IN_A_ROW
        found = limits(run, key).items()
        return any_of(*((above if ".max_" in name else below)(key, limit, patience) for name, limit in found))(run)

    return rule


def variety_falls(run: RunRecord) -> int | None:
    """Return since when pass@k, with the largest k, falls while the accuracy of samples rises."""
    sizes = [int(key.rpartition("_")[2]) for key in run.metrics if key.startswith("evaluation/pass_at_")]
    if not sizes or max(sizes) == 1:
        return None
    return all_of(rises("evaluation/sampled_accuracy", by=FALL), falls(f"evaluation/pass_at_{max(sizes)}", by=FALL))(
        run
    )


def _curve(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    return run.metrics.get(key, ([], []))


def _pairs(run: RunRecord, key: str) -> list[tuple[int, float]]:
    return list(zip(*_curve(run, key), strict=True))


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the variance of a sample; infinite, or NaN, where a sum of squares is too large."""
    mean = sum(values) / len(values)
    return mean, sum((value - mean) * (value - mean) for value in values) / (len(values) - 1)


def _is_evaluation(key: str) -> bool:
    return key.startswith("evaluation")


def _first(run: RunRecord, key: str, skip: int) -> float | None:
    """Return what the curve begins with, or None while the curve has no value after it."""
    number = 1 if _is_evaluation(key) else FIRST
    values = run.values(key)[skip:]
    return median(values[:number]) if len(values) > number else None


def _at_the_end(
    key: str,
    steps: Sequence[int],
    values: Sequence[Value],
    violates: Callable[[Value], bool],
    in_a_row: float = IN_A_ROW,
) -> int | None:
    """Return the step of the first of the values at the end that all violate a limit, if they are enough."""
    number = 0
    while number < len(values) and violates(values[-1 - number]):
        number += 1
    return steps[-number] if number >= (1 if _is_evaluation(key) else max(1, in_a_row)) else None
