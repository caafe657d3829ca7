# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The comparison of two models on the same problems, problem by problem, which shows whether B is better than A."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.estimators import NUM_RESAMPLES, bootstrap
from megatron_selfdistill.evaluation.evaluations import Evaluation


@dataclass(frozen=True)
class Difference:
    """One metric in both evaluations, and the difference between them."""

    metric: str
    a: float
    b: float
    difference: float
    """The difference ``b - a``."""
    low: float
    """The 2.5 % quantile of the difference over resampled problems."""
    high: float
    """The 97.5 % quantile of the difference over resampled problems."""
    probability_not_above: float | None
    """The share of the resamples in which B is not above A: the one-sided p-value of "B is above A".  None if the
    metric is 0 for every problem in both evaluations, so that there is nothing to compare."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of all metrics that both evaluations have."""

    a: str
    b: str
    num_problems: int
    num_resamples: int
    seed: int
    differences: list[Difference]
    other_settings: dict[str, list[Any]]
    """The settings that differ between the evaluations: name -> [value in A, value in B]."""

    @property
    def neither_answered(self) -> bool:
        """Whether neither A nor B has a correct response."""
        rates = ("greedy_accuracy", "avg_at_", "pass_at_")
        return not any(it.a or it.b for it in self.differences if it.metric.startswith(rates))

    def json(self) -> dict[str, Any]:
        """Return the comparison as plain values, the content of the file of --out."""
        return asdict(self)


def compare(a: Evaluation, b: Evaluation, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Comparison:
    """Compare B with A by a paired bootstrap over problems: `bootstrap` of the differences of all metrics.

    avg@k, pass@k and majority@k are unbiased estimates, so A and B may have different numbers of samples; avg_at_N is
    then called avg_at_k, and the comparison leaves out distinct_right and distinct_4grams, which depend on this number.
    Raises: `ConfigError` unless A and B have the same problems, and at least 2 problems.
    """
    _require_same_problems(a, b)
    values_a, values_b = dict(a.values), dict(b.values)
    avg_a, avg_b = (next((name for name in it if name.startswith("avg_at_")), None) for it in (values_a, values_b))
    if avg_a and avg_b and avg_a != avg_b:
        values_a = {"avg_at_k" if name == avg_a else name: value for name, value in values_a.items()}
        values_b = {"avg_at_k" if name == avg_b else name: value for name, value in values_b.items()}
    is_fair = avg_a == avg_b
    names = [name for name in values_a if name in values_b and (is_fair or not name.startswith("distinct_"))]
    differences = np.stack([values_b[name] - values_a[name] for name in names], axis=1)
    found = bootstrap(differences, num_resamples, seed)
    return Comparison(
        a=str(a.directory),
        b=str(b.directory),
        num_problems=len(a.ids),
        num_resamples=num_resamples,
        seed=seed,
        differences=[
            Difference(
                name,
                float(values_a[name].mean()),
                float(values_b[name].mean()),
                it.mean,
                it.low,
                it.high,
                it.probability_not_above_0 if values_a[name].any() or values_b[name].any() else None,
            )
            for name, it in zip(names, found, strict=True)
        ],
        other_settings=_other_settings(a.summary.get("settings", {}), b.summary.get("settings", {})),
    )


def _require_same_problems(a: Evaluation, b: Evaluation) -> None:
    fingerprints = [it.summary["data"]["fingerprint"] for it in (a, b)]
    if fingerprints[0] != fingerprints[1] or a.ids != b.ids:
        first = next((pair for pair in zip(a.ids, b.ids, strict=False) if pair[0] != pair[1]), None)
        where = f"; the first that differs is {first[0]!r} against {first[1]!r}" if first else ""
        raise ConfigError(
            f"expected two evaluations of the same problems, got {len(a.ids)} in {a.directory} with fingerprint "
            f"{fingerprints[0]} and {len(b.ids)} in {b.directory} with {fingerprints[1]}{where}; evaluate both on one "
            "file"
        )
    if len(a.ids) < 2:
        raise ConfigError(f"expected at least 2 problems to compare on, got {len(a.ids)} in {a.directory}")


def _other_settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in (*a, *(set(b) - set(a))) if a.get(name) != b.get(name)}
