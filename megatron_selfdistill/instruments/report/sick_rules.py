# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules by which a figure of a report is sick, as functions of a run.

A rule compares the values at the end of a curve with a limit, its floor, and calls the figure sick since the first of
them.  One odd value is never enough.  Each rule has one of three tests, with the probability that chance alone passes
it; a curve is looked at as often as it has values, and this probability is at most 1 / (`ODDS` x looks):

- *Change over steps*: the last m values lie beyond each of the first `FIRST` values.  Without a change every order of
  these values is equally likely, whatever the noise is, so the probability is 1 / C(FIRST + m, m).
- *Level over steps*: the last m values lie beyond the limit; if their median does not, the probability is 2^-m.
- *Evaluation*: two means over the same problems differ by more than z standard errors.  Values in [0, 1] with the mean
  p have a variance of at most p (1 - p).  The greedy accuracies are multiples of 1 / (number of problems).

Summed over the 40 curves of a page and 10,000 looks at each, fewer than 1 of 100 healthy runs is called sick; no change
up to its floor is one.  experiments/false_alarms.py measures this.  The rules without noise (a token is unconverged,
the learning rate is 0, teacher and student agree to 1e-6, a guard's own limit) need no test.  A value that is not
finite violates every limit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import NormalDist, median
from typing import Any

from megatron_selfdistill.instruments.report.run_record import RunRecord, limits
from megatron_selfdistill.metrics.run_log import finite

Span = tuple[float, float] | None
Rule = Callable[[RunRecord], int | None]
"""Returns the step since which a run is sick; None if the run is not sick, or if its values cannot tell yet."""

FIRST = 10
"""The number of first values of a curve over steps, with which the later ones are compared."""
ODDS = 20_000
"""The looks at a curve, times its values so far, in which chance alone passes a test once."""
FALL = 0.02
"""The change of an accuracy that counts as a change."""
HELP = 0.1
"""The smallest gain of accuracy by which a hint helps."""
LEARNT = 0.2
"""The smallest fall of a loss, as a share of its first values, by which a run learns."""


def in_a_row(looks: int, first: int = 0) -> int:
    """Return how many values at the end must agree, after ``looks`` values: beyond the ``first`` ones, or a level."""
    return next(m for m in itertools.count(1) if (math.comb(first + m, m) if first else 2**m) >= ODDS * looks)


FEWEST = next(looks for looks in itertools.count(FIRST) if FIRST + in_a_row(looks, FIRST) <= looks)
"""The fewest steps after which a change over steps can be found."""


def above(key: str, limit: float, number: float | None = None) -> Rule:
    """Return the rule that the metric is above ``limit`` for ``number`` steps in a row; None is the test of a level."""
    return lambda run: _at_the_end(*_curve(run, key), lambda value: not value <= limit, number)


def below(key: str, limit: float, number: float | None = None) -> Rule:
    """Return the rule that the metric is below ``limit``; ``number``: as for `above`."""
    return lambda run: _at_the_end(*_curve(run, key), lambda value: not value >= limit, number)


def rises(key: str, *, ratio: float = 1.0, by: float = 0.0, skip: int = 0, span: Span = (0, 1)) -> Rule:
    """Return the rule that the metric is above ``ratio`` times its first value, and above that value by ``by``.

    The first value of a curve over steps is the median of its first `FIRST` values.
    ``skip``: the number of values before the first value that counts.  ``span``: the smallest and the largest value
    that one problem of an evaluation can have; None leaves the test to another rule of an `all_of`.
    """
    return _moves(key, 1, ratio, by, skip, span)


def falls(key: str, *, ratio: float = 1.0, by: float = 0.0, skip: int = 0, span: Span = (0, 1)) -> Rule:
    """Return the rule that the metric is below ``ratio`` times its first value, and below it by ``by``; see `rises`."""
    return _moves(key, -1, ratio, by, skip, span)


def falls_again(key: str) -> Rule:
    """Return the rule that a share of an evaluation is a tenth, and `FALL`, below its largest value before."""

    def rule(run: RunRecord) -> int | None:
        steps, values = _curve(run, key)
        differ = _test_of_evaluations(run, len(values) ** 2)
        at = list(zip(values, itertools.accumulate(values, max), strict=True))
        return _at_the_end(steps, at, lambda at: at[0] < 0.9 * at[1] - FALL and differ(*at), 1)

    return rule


def starts(key: str, violates: Callable[[float], bool], number: int = 1) -> Rule:
    """Return the rule that the first ``number`` values of the metric violate a limit, which has one look."""

    def rule(run: RunRecord) -> int | None:
        at = _pairs(run, key)[:number]
        return at[0][0] if len(at) == number and all(violates(value) for _, value in at) else None

    return rule


def once_above(key: str, limit: float) -> Rule:
    """Return the rule that any value of the metric is above ``limit``."""
    return lambda run: next((step for step, value in _pairs(run, key) if value > limit), None)


def never_above(key: str, limit: float) -> Rule:
    """Return the rule that no value of the metric is above ``limit``."""

    def rule(run: RunRecord) -> int | None:
        steps, values = _curve(run, key)
        return steps[0] if len(values) >= FIRST and max(values) <= limit else None

    return rule


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


def above_other(key: str, other: str, *, ratio: float = 1.0, by: float = 0.0) -> Rule:
    """Return the rule that the metric is above ``ratio`` times another metric, and above this product by ``by``."""

    def rule(run: RunRecord) -> int | None:
        both = _both(run, key, other)
        return _at_the_end([step for step, *_ in both], both, lambda at: at[1] > ratio * at[2] + by)

    return rule


def not_above_at_first(key: str, other: str) -> Rule:
    """Return the rule that an accuracy exceeds another one by less than `HELP`, at the first step with both.

    The upper bound of the gain counts, with two right and two wrong answers more, so that few problems show nothing.
    """

    def rule(run: RunRecord) -> int | None:
        number = _num_problems(run) + 4
        for step, *shares in _both(run, key, other)[:1]:
            one, two = (min(max(((number - 4) * share + 2) / number, 0.0), 1.0) for share in shares)
            gain = one - two + _z(1) * math.sqrt((one * (1 - one) + two * (1 - two)) / number)
            return step if gain < HELP else None
        return None

    return rule


def only_part(key: str, keys: Sequence[str], share: float = 0.95, least: float = 1e-3) -> Rule:
    """Return the rule that the metric has ``share`` of the sum of ``keys``, where this sum is at least ``least``."""

    def rule(run: RunRecord) -> int | None:
        curves = [dict(_pairs(run, name)) for name in keys]
        at = [(value, sum(of.get(step, 0.0) for of in curves)) for step, value in _pairs(run, key)]
        return _at_the_end(_curve(run, key)[0], at, lambda of: of[0] > share * of[1] and of[1] >= least)

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


def only_if(condition: Callable[[RunRecord], object], rule: Rule) -> Rule:
    """Return ``rule`` for runs of which the condition is true; no other run is sick by it."""
    return lambda run: rule(run) if condition(run) else None


def near(metric: str, bound: Callable[[RunRecord], float | None], share: float) -> Rule:
    """Return the rule that the metric is at least ``share`` of ``bound``; a run without a bound is not sick by it."""
    return lambda run: None if (limit := bound(run)) is None else above(metric, share * limit)(run)


def bound_of_k(run: RunRecord) -> float | None:
    """Return the bound of k that the configuration of a run gives; None without a bound, and for a k that is given."""
    if run.config.get("target.rule") != "entropy_matched":
        return None
    bound, weight = run.config.get("target.k_max"), finite(run.config.get("target.teacher_weight"))
    return finite(bound) if bound != "1 + w" or weight is None else 1 + weight


def bound_of_staleness(run: RunRecord) -> float | None:
    """Return rollout.max_staleness; None below 2, where the age of the weights can be its bound at every step."""
    bound = finite(run.config.get("rollout.max_staleness"))
    return bound if bound is not None and bound >= 2 else None


def beyond_limits(key: str) -> Rule:
    """Return the rule that the metric is beyond a limit of its guards, for guards.patience steps in a row."""

    def rule(run: RunRecord) -> int | None:
        patience = finite(run.config.get("guards.patience")) or 1
        found = limits(run, key).items()
        return any_of(*((above if ".max_" in name else below)(key, limit, patience) for name, limit in found))(run)

    return rule


def variety_falls(run: RunRecord) -> int | None:
    """Return since when pass@k, with the largest k, falls while the accuracy of samples rises."""
    sizes = [int(key.rpartition("_")[2]) for key in run.metrics if key.startswith("evaluation/pass_at_")]
    fewer = falls(f"evaluation/pass_at_{max(sizes, default=1)}", by=FALL)
    return all_of(rises("evaluation/sampled_accuracy", by=FALL), fewer)(run)


def answers_become_one(run: RunRecord) -> int | None:
    """Return since when the number of different right answers falls while the accuracy of samples rises."""
    span = 0, finite(run.config.get("evaluation.num_samples")) or 1
    fewer = falls("evaluation/distinct_right", ratio=0.9, span=span)
    return all_of(rises("evaluation/sampled_accuracy", by=FALL), fewer)(run)


def speaks_of_the_hint(kind: str) -> Rule:
    """Return the rule that the words about the hint in the responses of evaluations double and rise by 1 per 1000.

    ``kind``: greedy or sampled.  The test takes the number of words per response for the share of such responses.
    """

    def rule(run: RunRecord) -> int | None:
        span = 0, 1000 / max([1.0, *run.values(f"evaluation/{kind}_mean_length")[-1:]])
        return rises(f"evaluation/{kind}_leak_words_per_1000", ratio=2, by=1, span=span)(run)

    return rule


def _moves(key: str, sign: int, ratio: float, by: float, skip: int, span: Span) -> Rule:
    """Return the rule of `rises` for the ``sign`` 1 and of `falls` for -1."""
    evaluated = key.startswith("evaluation")

    def rule(run: RunRecord) -> int | None:
        (steps, values), first = _curve(run, key), run.values(key)[skip:]
        number = 1 if evaluated else FIRST
        if len(first) <= number:
            return None
        middle = median(first[:number])
        limit = max(sign * value for value in (*first[:number], ratio * middle, middle + sign * by))
        differ = _test_of_evaluations(run, len(values), span) if evaluated and span else operator.ne
        needed = 1 if evaluated else in_a_row(len(values), FIRST)
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


def _pairs(run: RunRecord, key: str) -> list[tuple[int, float]]:
    return list(zip(*_curve(run, key), strict=True))


def _both(run: RunRecord, key: str, other: str) -> list[tuple[int, float, float]]:
    """Return (step, value, value of ``other``) of the steps that have both metrics."""
    others = dict(_pairs(run, other))
    return [(step, value, others[step]) for step, value in _pairs(run, key) if step in others]


def _at_the_end(
    steps: Sequence[int], values: Sequence[Any], violates: Callable[[Any], bool], needed: float | None = None
) -> int | None:
    """Return the step of the first of the values at the end that all violate a limit, if they are enough.

    ``needed``: the number of values that are enough; None is the test of a level.
    """
    number = 0
    while number < len(values) and violates(values[-1 - number]):
        number += 1
    return steps[-number] if number >= max(1, in_a_row(len(values)) if needed is None else needed) else None
