# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules by which a figure of a report is sick, as functions of a run.

A rule compares the values at the end of a curve with a limit, its floor, and calls the figure sick since the first of
them.  One odd value is never enough.  Each rule has a test, with the probability that chance alone passes it; a curve
is looked at as often as it has values, and this probability is at most 1 / (`ODDS` x looks):

- *Change over steps*: the last m values lie beyond each of the first `FIRST` values.  Without a change every order of
  these values is equally likely, whatever the noise is, so the probability is 1 / C(FIRST + m, m).
- *Evaluation*: two means over the same problems differ by more than z standard errors.  Values in [0, 1] with the mean
  p have a variance of at most p (1 - p).  The greedy accuracies are multiples of 1 / (number of problems).

Summed over the curves of a page and 10,000 looks at each, fewer than 1 of 100 healthy runs is called sick; no change
up to its floor is one.  experiments/false_alarms.py measures this.  A token that is unconverged needs no test.  A value
that is not finite violates every limit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import NormalDist, median
from typing import Any

from megatron_selfdistill.instruments.report.run_record import RunRecord

Rule = Callable[[RunRecord], int | None]
"""Returns the step since which a run is sick; None if the run is not sick, or if its values cannot tell yet."""

FIRST = 10
"""The number of first values of a curve over steps, with which the later ones are compared."""
ODDS = 20_000
"""The looks at a curve, times its values so far, in which chance alone passes a test once."""
FALL = 0.02
"""The change of an accuracy that counts as a change."""
LEARNT = 0.2
"""The smallest fall of a loss, as a share of its first values, by which a run learns."""


def in_a_row(looks: int) -> int:
    """Return how many values at the end of ``looks`` values must lie beyond the `FIRST` ones."""
    return next(m for m in itertools.count(1) if math.comb(FIRST + m, m) >= ODDS * looks)


FEWEST = next(looks for looks in itertools.count(FIRST) if FIRST + in_a_row(looks) <= looks)
"""The fewest steps after which a change over steps can be found."""


def rises(key: str, *, ratio: float = 1.0, by: float = 0.0, span: tuple[float, float] = (0, 1)) -> Rule:
    """Return the rule that the metric is above ``ratio`` times its first value, and above that value by ``by``.

    The first value of a curve over steps is the median of its first `FIRST` values.
    ``span``: the smallest and the largest value that one problem of an evaluation can have.
    """
    return _moves(key, 1, ratio, by, span)


def falls(key: str, *, ratio: float = 1.0, by: float = 0.0) -> Rule:
    """Return the rule that the metric is below ``ratio`` times its first value, and below it by ``by``; see `rises`."""
    return _moves(key, -1, ratio, by, (0, 1))


def falls_again(key: str) -> Rule:
    """Return the rule that a share of an evaluation is a tenth, and `FALL`, below its largest value before."""

    def rule(run: RunRecord) -> int | None:
        steps, values = _curve(run, key)
        differ = _test_of_evaluations(run, len(values) ** 2)
        at = list(zip(values, itertools.accumulate(values, max), strict=True))
        return _at_the_end(steps, at, lambda at: at[0] < 0.9 * at[1] - FALL and differ(*at), 1)

    return rule


def once_above(key: str, limit: float) -> Rule:
    """Return the rule that any value of the metric is above ``limit``."""
    return lambda run: next((step for step, value in zip(*_curve(run, key), strict=True) if value > limit), None)


def flat(key: str) -> Rule:
    """Return the rule that the metric has not fallen by `LEARNT`, as far as the noise of its values can tell.

    The last values, as many as the `FIRST` ones, are compared by the upper bound of the fall.
    """

    def rule(run: RunRecord) -> int | None:
        values = run.values(key)
        if len(values) < 3 * FIRST:
            return None
        (first, one), (last, two) = _mean_and_variance(values[:FIRST]), _mean_and_variance(values[-FIRST:])
        fall = first - last + _z(len(values)) * math.sqrt((one + two) / FIRST)
        return _curve(run, key)[0][-FIRST] if fall < LEARNT * first else None

    return rule


def _moves(key: str, sign: int, ratio: float, by: float, span: tuple[float, float]) -> Rule:
    """Return the rule of `rises` for the ``sign`` 1 and of `falls` for -1."""
    evaluated = key.startswith("evaluation")

    def rule(run: RunRecord) -> int | None:
        (steps, values), first = _curve(run, key), run.values(key)
        number = 1 if evaluated else FIRST
        if len(first) <= number:
            return None
        middle = median(first[:number])
        limit = max(sign * value for value in (*first[:number], ratio * middle, middle + sign * by))
        differ = _test_of_evaluations(run, len(values), span) if evaluated else operator.ne
        needed = 1 if evaluated else in_a_row(len(values))
        return _at_the_end(steps, values, lambda value: not sign * value <= limit and differ(value, middle), needed)

    return rule


def _test_of_evaluations(run: RunRecord, looks: int, span: tuple[float, float] = (0, 1)) -> Callable[..., bool]:
    """Return whether two means over the problems of an evaluation differ by more than chance, as a function of both."""
    (low, high), number, least = span, _num_problems(run), _z(looks)

    def differ(one: float, other: float) -> bool:
        share = min(max(((one + other) / 2 - low) / (high - low), 0.0), 1.0)
        noise = (high - low) * math.sqrt(2 * share * (1 - share) / number)
        return not abs(one - other) <= least * noise

    return differ


def _num_problems(run: RunRecord) -> int:
    """Return the number of problems of the evaluations, or a divisor of it, or 10,000 if there are more."""
    shares = run.values("evaluation/greedy_accuracy")
    return min(10_000, math.lcm(*(Fraction(share).limit_denominator(10_000).denominator for share in shares)))


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the variance of a sample; infinite, or NaN, where a sum of squares is too large."""
    mean = sum(values) / len(values)
    return mean, sum((value - mean) * (value - mean) for value in values) / (len(values) - 1)


def _z(looks: int) -> float:
    return NormalDist().inv_cdf(1 - 1 / (ODDS * max(1, looks)))


def _curve(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    return run.metrics.get(key, ([], []))


def _at_the_end(
    steps: Sequence[int], values: Sequence[Any], violates: Callable[[Any], bool], needed: int
) -> int | None:
    """Return the step of the first of the values at the end that all violate a limit, if at least ``needed`` do."""
    number = 0
    while number < len(values) and violates(values[-1 - number]):
        number += 1
    return steps[-number] if number >= needed else None
