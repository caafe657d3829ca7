# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run directory says about its run, as plain values: facts, configuration, metrics, events and responses.

The directory of a Trainer of transformers or TRL has metrics alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics.guards import ENTROPY_RISE
from megatron_selfdistill.metrics.run_log import (
    METRICS_FILE,
    finite,
    read_evaluation_samples,
    read_events,
    read_metrics,
    read_samples,
    shortened,
)

logger = logging.getLogger(__name__)

PHASES = (
    *("rollout", "environment", "sync", "solutions", "read", "pack"),
    *("measure", "train", "optimizer", "evaluation", "checkpoint"),
)
"""The phases of a step, in the order of the bar that shows where the time of a step goes."""


@dataclass(frozen=True)
class RunRecord:
    """One run as its directory describes it; every field may be empty where the directory lacks the file."""

    label: str
    """The short name of the run, unique in a report."""
    config: Mapping[str, Any]
    """The keys of config.yaml with their values, flat: ``optimizer.lr``."""
    metrics: Mapping[str, tuple[list[int], list[float]]]
    """The key of a metric -> (steps, values)."""
    events: Sequence[Mapping[str, Any]]
    """The lines of events.jsonl."""
    samples: Sequence[Mapping[str, Any]]
    """The lines of samples.jsonl; empty if the run must not show contents."""
    evaluation_samples: Sequence[Mapping[str, Any]]
    """The lines of evaluation_samples.jsonl; empty if the run must not show contents."""
    shows_contents: bool = True
    """Whether a report may show the texts of the run."""

    @property
    def launches(self) -> list[Mapping[str, Any]]:
        """The events ``started``, one per launch."""
        return [event for event in self.events if event["event"] == "started"]

    @property
    def last_step(self) -> int:
        """The last step of the metrics; 0 without metrics."""
        return max((steps[-1] for steps, _ in self.metrics.values()), default=0)

    def values(self, key: str) -> list[float]:
        """Return the finite values of a metric, in order."""
        return [value for value in self.metrics.get(key, ([], []))[1] if math.isfinite(value)]


def read_runs(run_dirs: Sequence[str | Path]) -> list[RunRecord]:
    """Return the records of runs, with unique labels: the shortest ends of their paths that differ.

    Raises: `ConfigError` for a directory without metrics, and for a directory that is named twice.
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    for path in paths:
        if not any((path / name).is_file() for name in (METRICS_FILE, TRAINER_STATE_FILE)):
            raise ConfigError(
                f"expected a run directory, got {path}, which has neither {METRICS_FILE} nor {TRAINER_STATE_FILE}; "
                "name a run_dir, or the output_dir of a Trainer of transformers after its save_state()"
            )
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("expected different run directories, got one of them twice; name each run once")
    return [read_run(path, label) for path, label in zip(paths, _labels(resolved), strict=True)]


def read_run(run_dir: Path, label: str) -> RunRecord:
    """Return the record of one run.

    The configuration decides whether the record has texts: those of chat logs need conversations.show_contents=true,
    whatever earlier launches wrote.  Without a readable config.yaml there are none.
    """
    config = _configuration(run_dir)
    shows = bool(config) and (
        config.get("data.kind") != "conversations" or config.get("conversations.show_contents") is True
    )
    return RunRecord(
        label=label,
        config=config,
        metrics=_columns(read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else _trainer_metrics(run_dir)),
        events=read_events(run_dir),
        samples=read_samples(run_dir) if shows else [],
        evaluation_samples=read_evaluation_samples(run_dir) if shows else [],
        shows_contents=shows,
    )


def limits(run: RunRecord, key: str) -> dict[str, float]:
    """Return name -> value of the limits that the guards set on a metric.

    A limit that is a multiple of the first values is there as soon as the reference is complete.
    """
    if key in _LARGEST:
        largest = finite(run.config.get(_LARGEST[key]))
        return {} if largest is None else {_LARGEST[key]: largest}
    steps = run.config.get("guards.reference_steps")
    if not isinstance(steps, int):
        return {}
    reference = run.values(key)[: max(0, steps)]
    if not reference or len(reference) < steps:
        return {}
    mean = sum(reference) / len(reference)
    found = {}
    for option in _OPTIONS.get(key, ()):
        ratio = finite(run.config.get(f"guards.{option}"))
        if ratio is not None:
            found[f"guards.{option}"] = ratio * mean
    if "guards.entropy.max_ratio" in found:
        found["guards.entropy.max_ratio"] = max(found["guards.entropy.max_ratio"], mean + ENTROPY_RISE)
    return {name: limit for name, limit in found.items() if math.isfinite(limit)}


_LARGEST = {"sampler/log_prob_mean_abs_diff": "guards.max_log_prob_distance"}
_OPTIONS = {
    "entropy/student": ("entropy.min_ratio", "entropy.max_ratio"),
    "response/length_mean": ("min_length_ratio",),
}


def step_shares(run: RunRecord) -> dict[str, float]:
    """Return phase -> mean seconds per step, without the first step, and ``other`` for the rest of the step.

    Empty for a run of fewer than two steps.
    """
    steps, seconds = run.metrics.get("seconds/step", ([], []))
    later = set(steps[1:])
    total = sum(value for step, value in zip(steps, seconds, strict=True) if step in later)
    if not later or not 0 < total < math.inf:
        return {}
    shares = {}
    for phase in PHASES:
        at, spent = run.metrics.get(f"seconds/{phase}", ([], []))
        in_phase = sum(value for step, value in zip(at, spent, strict=True) if step in later and math.isfinite(value))
        if 0 < in_phase < math.inf:
            shares[phase] = in_phase / len(later)
    rest = total / len(later) - sum(shares.values())
    return shares | ({"other": rest} if rest > 0 else {})


def _configuration(run_dir: Path) -> dict[str, Any]:
    """Return the keys of a run's config.yaml, flat; empty without the file and, with a warning, for another file."""
    path = run_dir / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(stored, Mapping):
            raise ValueError(f"expected keys with values, got {type(stored).__name__}")
        return dict(_flat(stored))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        logger.warning("%s is not the configuration of a run, so settings and texts are missing: %s", path, reason)
        return {}


def _trainer_metrics(run_dir: Path) -> Iterator[dict[str, float]]:
    """Yield the numbers that a Trainer of transformers or TRL has logged, with this project's names where it has one.

    A warning replaces the numbers of a file that is not such a log.
    """
    path = run_dir / TRAINER_STATE_FILE
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        for line in lines:
            numbers = {_OF_TRAINERS.get(key, key): finite(value) for key, value in line.items()}
            yield {"step": int(line["step"])} | {key: value for key, value in numbers.items() if value is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        logger.warning("%s is not the log of a Trainer, so numbers are missing: %s", path, reason)


TRAINER_STATE_FILE = "trainer_state.json"
_OF_TRAINERS = {
    "loss": "loss/mean",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy/student",
    "completions/mean_length": "response/length_mean",
    "completions/max_length": "response/length_max",
    "completions/clipped_ratio": "response/truncated_share",
}
"""The key of a metric in the log of transformers or TRL -> its key here."""


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _columns(lines: Iterable[Mapping[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    columns: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step":
                columns.setdefault(key, {})[int(line["step"])] = value
    return {key: (sorted(at), [at[step] for step in sorted(at)]) for key, at in columns.items()}


def _labels(paths: Sequence[Path]) -> list[str]:
    candidates = (["/".join(path.parts[-length:]) for path in paths] for length in itertools.count(1))
    return next(labels for labels in candidates if len(set(labels)) == len(labels))
