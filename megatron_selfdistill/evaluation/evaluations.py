# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Evaluations as directories, and the comparison of two of them, problem by problem, which shows whether B is better.

The files of a directory are summary.json, and problems.jsonl with one line per problem.

{"model": .., "data": {"path": .., "fingerprint": .., "num_problems": ..}, "settings": {..},
 "metrics": {"greedy_accuracy": .., "avg_at_16": .., ..}, "intervals": {"greedy_accuracy": [low, high], ..}}

{"id": .., "num_samples": 16, "num_correct": 5, "greedy": {"correct": .., "length": .., "truncated": .., "answer": ..},
 "samples": [{..}, ..], "pass_at_k": {"4": ..}, "majority_at_k": {"4": ..}, "distinct_right": 2, "distinct_4grams": ..}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.estimators import bootstrap
from megatron_selfdistill.evaluation.evaluation_directory import PROBLEMS, RESPONSES, SUMMARY
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult, ProblemResult
from megatron_selfdistill.metrics.run_log import json_object, replace_file


@dataclass(frozen=True)
class Evaluation:
    """The content of an evaluation's directory."""

    directory: Path
    summary: dict[str, Any]
    ids: list[str]
    values: dict[str, np.ndarray]
    """Metric -> one number per problem ``[num_problems]``, whose mean is the metric."""


def write_evaluation(directory: Path, result: EvaluationResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the files of ``result`` and return the summary; ``about`` is its content besides metrics and intervals.

    Each file appears under its name only when it is complete, and the summary appears last.  Transcripts, if there are
    any, go to responses.jsonl.  Equal results make equal files.
    """
    lines = [_line(problem, list(result.pass_at_k), list(result.majority_at_k)) for problem in result.problems]
    metrics = {name.removeprefix("/"): value for name, value in result.metrics("").items()}
    values = _values(lines)
    means = bootstrap(np.stack(list(values.values()), axis=1)) if len(lines) > 1 else []
    intervals = {name: [it.low, it.high] for name, it in zip(values, means, strict=bool(means))}
    summary = {**about, "metrics": metrics, "intervals": intervals}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SUMMARY).unlink(missing_ok=True)  # the summary states that the other files are complete
    (directory / RESPONSES).unlink(missing_ok=True)
    if result.transcripts:
        replace_file(directory / RESPONSES, _json_lines(map(dataclasses.asdict, result.transcripts)))
    replace_file(directory / PROBLEMS, _json_lines(lines))
    replace_file(directory / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def read_evaluation(directory: Path) -> Evaluation:
    """Return the evaluation in ``directory``.  Raises: `ConfigError` if the files are incomplete."""
    try:
        summary = json_object((directory / SUMMARY).read_bytes())
        with (directory / PROBLEMS).open("rb") as stream:
            lines = list(map(json_object, stream))
        values, ids = _values(lines), [line["id"] for line in lines]
        if len(lines) != summary["data"]["num_problems"]:
            raise ValueError(f"{len(lines)} lines for {summary['data']['num_problems']} problems")
        return Evaluation(directory, summary, ids, values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"expected the files that selfdistill evaluate writes in {directory}, got {type(error).__name__}: {error}"
        ) from error


def data_fingerprint(problems: Sequence[Problem]) -> str:
    """Return a hash of the problems' ids, texts and answers, in order.

    Solutions do not change the hash, since an evaluation need not show them.
    """
    return ProblemSet([dataclasses.replace(problem, solution="") for problem in problems]).fingerprint


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
    differences: list[Difference]
    other_settings: dict[str, list[Any]]
    """The settings that differ between the evaluations: name -> [value in A, value in B]."""


def compare(a: Evaluation, b: Evaluation) -> Comparison:
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
    names = [name for name in values_a if name in values_b and (avg_a == avg_b or not name.startswith("distinct_"))]
    found = bootstrap(np.stack([values_b[name] - values_a[name] for name in names], axis=1))
    return Comparison(
        a=str(a.directory),
        b=str(b.directory),
        num_problems=len(a.ids),
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


def _line(problem: ProblemResult, ks: Sequence[int], majority_ks: Sequence[int]) -> dict[str, Any]:
    return {
        "id": problem.id,
        "num_samples": len(problem.samples),
        "num_correct": problem.num_correct,
        "greedy": dataclasses.asdict(problem.greedy),
        "samples": [dataclasses.asdict(verdict) for verdict in problem.samples],
        "pass_at_k": {str(k): problem.pass_at_k(k) for k in ks},
        "majority_at_k": {str(k): problem.majority_at_k(k) for k in majority_ks},
        "distinct_right": problem.distinct_right,
        "distinct_4grams": problem.distinct_4grams,
    }


def _values(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the number of each problem by metric, in the order in which the metrics are shown."""

    def column(numbers: Iterable[float]) -> np.ndarray:
        return np.array(list(numbers), dtype=np.float64)

    values = {"greedy_accuracy": column(line["greedy"]["correct"] for line in lines)}
    samples = [line["samples"] for line in lines]
    if samples and all(samples):
        values[f"avg_at_{len(samples[0])}"] = column(np.mean([s["correct"] for s in those]) for those in samples)
    for name in ("pass_at_k", "majority_at_k"):
        for k in lines[0][name] if lines else ():
            values[f"{name[:-1]}{k}"] = column(line[name][k] for line in lines)
    means = {"length": "mean_length", "truncated": "truncated_share", "loops": "loop_share"}
    if all(line["greedy"].get("reward") is not None for line in lines):  # of several turns
        means |= {"reward": "mean_reward", "turns": "mean_turns"}
    for what, name in means.items():
        values[f"greedy_{name}"] = column(line["greedy"][what] for line in lines)
        if samples and all(samples):
            values[f"sampled_{name}"] = column(np.mean([s[what] for s in those]) for those in samples)
    for name in ("distinct_right", "distinct_4grams"):
        if lines and all(line.get(name) is not None for line in lines):
            values[name] = column(line[name] for line in lines)
    values |= _values_of_calibration("greedy", [[line["greedy"]] for line in lines])
    return values | _values_of_calibration("sampled", samples)


def _values_of_calibration(kind: str, responses: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    """Return the numbers of `Calibration` that are means over the problems, from the responses to each problem.

    The result is empty without responses, and where a confidence is unknown.
    """
    if not responses or not all(responses) or any(it.get("confidence") is None for them in responses for it in them):
        return {}
    numbers = [[(it["confidence"], it["correct"], it["states_confidence"]) for it in them] for them in responses]
    confidence, correct, states = np.moveaxis(np.array(numbers, dtype=np.float64), 2, 0)
    return {
        f"{kind}_brier": np.square(confidence - correct).mean(1),
        f"{kind}_ocg": (confidence - correct).mean(1),
        f"{kind}_stated_confidence": states.mean(1),
    }


def _json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
