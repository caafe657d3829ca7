# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The report of runs: one page with facts, curves, differences, responses and events."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from megatron_selfdistill.instruments.explorer.target_page import write_target_pages
from megatron_selfdistill.instruments.html_page import asset, html_page
from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_facts import differences, event_rows, facts, status
from megatron_selfdistill.instruments.report.run_record import RunRecord, limits, read_runs, step_shares
from megatron_selfdistill.instruments.report.sick_rules import FALL, FEWEST
from megatron_selfdistill.metrics.run_log import REPORT_FILE, finite, replace_file

MAX_POINTS = 1200
"""The largest number of points of a curve in a report; longer curves are downsampled."""
_OF_TURNS = ("episode", "turn", "reward", "hint", "reply")  # the fields of a sample that is a turn of an episode
_DIGITS = 5  # significant digits of a value in a report

MAX_STEPS_WITH_TEXT = 12
"""The largest number of steps of a run whose responses a report holds; longer runs keep the first, the last and steps
between them at equal distances."""

SCRIPTS = ("uplot.min.js", "figure.js", "responses.js", "share.js", "run_report.js")
STYLES = ("uplot.min.css", "run_report.css")


def write_report(run_dirs: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write the report of one run or of several runs over each other, and return its path.

    ``path``: the file, by default report.html in the first run directory.  The file is replaced in one move, so a kill
    leaves the report that was there before.
    Raises: `ConfigError` for a directory that is no run directory; OSError if the file cannot be written.
    """
    runs = read_runs(run_dirs)
    target = Path(run_dirs[0]) / REPORT_FILE if path is None else Path(path)
    explored = [_explored(run, Path(place), target) for run, place in zip(runs, run_dirs, strict=True)]
    replace_file(target, report_page(runs, explored).encode(errors="backslashreplace"))  # a name may be no text
    return target


def report_page(runs: Sequence[RunRecord], explored: Sequence[Sequence[Mapping[str, Any]]] = ()) -> str:
    """Return the page of runs as one HTML file (`html_page`).

    ``explored``: for each run its links to pages of the target explorer, each with href, step, sample and, in an
    episode, turn.
    """
    keys = {key for run in runs for key in run.metrics}
    present = {key for figures in GROUPS.values() for figure in figures for key in figure.present(keys)}
    curves = {
        key: [curve_of(*run.metrics[key]) if key in run.metrics else None for run in runs] for key in sorted(present)
    }
    overview = {
        "runs": [_run(run) for run in runs],
        "groups": _groups(curves),
        "differences": differences(runs),
        "explored": list(explored) if any(explored) else None,
    }
    data: dict[str, Any] = {"overview": overview, "curves": curves}
    if any(run.evaluation_samples for run in runs):
        data["evaluations"] = [_spread(run.evaluation_samples, _evaluated) for run in runs]
    if any(run.samples for run in runs):
        data["samples"] = [_spread(run.samples, _sampled) for run in runs]
    title = " and ".join(run.label for run in runs)
    licence = f"/*\n{asset('uplot.LICENSE')}*/\n"  # the licence asks for its notice in every copy of uPlot
    scripts = [licence + asset(name) if name == "uplot.min.js" else asset(name) for name in SCRIPTS]
    return html_page(f"{title} · report", asset("run_report.html"), [asset(name) for name in STYLES], scripts, data)


def _explored(run: RunRecord, run_dir: Path, target: Path) -> list[dict[str, Any]]:
    """Write the pages of a run's explored responses, and return the links to them from the report ``target``."""
    if not run.shows_contents:
        return []
    return [
        {"href": _reference(path, target.parent), "step": step, "sample": sample} | ({"turn": turn} if turn else {})
        for path, (step, sample, turn) in write_target_pages(run_dir).items()
    ]


def _reference(path: Path, start: Path) -> str:
    return quote(os.fsencode(os.path.relpath(path.resolve(), start.resolve()).replace(os.sep, "/")))


def _groups(keys: Collection[str]) -> list[dict[str, Any]]:
    groups = []
    for title, figures in GROUPS.items():
        shown = ("title", "unit", "healthy", "sick", "guarded")
        kept = [
            {name: getattr(figure, name) for name in shown}
            | {"lines": list(metrics.items()), "judged": bool(figure.rules)}
            for figure in figures
            if (metrics := figure.present(keys))
        ]
        if kept:
            groups.append({"title": title, "figures": kept})
    return groups


def _run(run: RunRecord) -> dict[str, Any]:
    guarded = [figure.guarded for figures in GROUPS.values() for figure in figures if figure.guarded is not None]
    return {
        "label": run.label,
        "status": status(run),
        "summary": summary(run),
        "sick": [title for title, _ in sick_figures(run)],
        "facts": facts(run),
        "events": event_rows(run),
        "resumed": [launch["step"] for launch in run.launches if launch["step"] > 0],
        "shares": step_shares(run),
        "limits": {key: limits(run, key) for key in guarded},
    }


def curve_of(steps: Sequence[int], values: Sequence[float]) -> list[list[Any]]:
    """Return a curve as JSON: the steps of its points, their values, the last steps of its buckets, and their means.

    Steps are differences from the step before, and values that are not finite are null.  A curve of more than
    `MAX_POINTS` values is cut into buckets of equally many values.  A bucket keeps its smallest and its largest
    finite value and its first value that is not finite, at their own steps.  The first and the last value of the curve
    stay, too.  A smoothed curve uses the means of the finite values of the buckets; a shorter curve has no buckets.
    """
    if len(steps) <= MAX_POINTS:
        return [_differences(steps), [_short(value) for value in values], [], []]
    num_buckets = MAX_POINTS // 2
    kept, mean_steps, means = {0, len(steps) - 1}, [], []
    for bucket in range(num_buckets):
        start, end = (len(steps) * b // num_buckets for b in (bucket, bucket + 1))
        finite = [i for i in range(start, end) if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < end - start:
            kept.add(next(i for i in range(start, end) if not math.isfinite(values[i])))
        mean_steps.append(steps[end - 1])
        means.append(_short(sum(values[i] for i in finite) / len(finite)) if finite else None)
    places = sorted(kept)
    points = _differences([steps[i] for i in places])
    return [points, [_short(values[i]) for i in places], _differences(mean_steps), means]


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _differences(steps: Sequence[int]) -> list[int]:
    return [step - before for before, step in zip([0, *steps], steps, strict=False)]


def _spread(
    records: Sequence[Mapping[str, Any]], compact: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records of at most `MAX_STEPS_WITH_TEXT` steps, each with its step."""
    steps = sorted({record["step"] for record in records})
    if len(steps) > MAX_STEPS_WITH_TEXT:
        last = MAX_STEPS_WITH_TEXT - 1
        steps = [steps[i * (len(steps) - 1) // last] for i in range(last + 1)]
    kept = set(steps)
    return [{"step": record["step"], **compact(record)} for record in records if record["step"] in kept]


def _evaluated(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("problem_id", "sample", "prompt", "response", "correct", "length", "truncated")
    return {name: record[name] for name in names}


def _sampled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample with three numbers per token: text, teacher minus student in hundredths of a nat, loss, k.

    A turn of an episode keeps the fields that only turns have.
    """
    tokens = record["tokens"]
    names = "text student_log_prob teacher_log_prob loss k status".split()
    columns = zip(*(tokens[name] for name in names), strict=True)
    return {
        "problem_id": record["problem_id"],
        "prompt": record["prompt"],
        "solution": record["solution"],
        "teacher": str(record.get("teacher", "")),
        "truncated": record["truncated"],
        **{name: record[name] for name in _OF_TURNS if "turn" in record},
        "tokens": [
            [text, _difference(teacher, student), _number(loss), _number(k), status]
            for text, student, teacher, loss, k, status in columns
        ],
    }


def _number(value: Any) -> float | None:
    """Return a number of samples.jsonl to 3 significant digits; None for null and for NaN and infinities, strings."""
    number = finite(value)
    return None if number is None else float(f"{number:.3g}")


def _difference(teacher: Any, student: Any) -> float | None:
    of_teacher, of_student = finite(teacher), finite(student)
    if of_teacher is None or of_student is None:
        return None
    return finite(round(of_teacher - of_student, 2))


class SummaryLine(NamedTuple):
    """One line about a run."""

    label: str
    text: str
    state: str
    """What the line says about the run: "good", "bad", or "open" for a line that does not judge, or not yet."""


ACCURACIES = {"evaluation/greedy_accuracy": "greedy", "evaluation/sampled_accuracy": "sampled"}
LOSSES = {"loss/mean": "loss", "loss/reverse_kl": "reverse KL"}
CHANGES = {"entropy/student": "entropy", "evaluation/greedy_mean_length": "length", "response/length_mean": "length"}


def summary(run: RunRecord) -> list[SummaryLine]:
    """Return the three lines of a run."""
    return [_learns(run), _is_healthy(run), _changed(run)]


def sick_figures(run: RunRecord) -> Iterator[tuple[str, int]]:
    """Yield the title of each figure that is sick by its own rule, with the step since which it is."""
    for figures in GROUPS.values():
        for figure in figures:
            since = figure.sick_since(run) if figure.present(run.metrics) else None
            if since is not None:
                yield figure.title, since


def _learns(run: RunRecord) -> SummaryLine:
    for key, kind in ACCURACIES.items():
        steps, values = _finite(run, key)
        if len(values) == 1:
            text = f"one evaluation so far: accuracy ({kind}) {values[0]:.3f} at step {steps[0]}"
            return SummaryLine("Learns?", text, "open")
        if values:
            first, last, best = values[0], values[-1], max(values)
            text = f"accuracy ({kind}) {first:.3f} → {last:.3f}, steps {steps[0]} to {steps[-1]}"
            if best > max(first, last) + FALL:
                text += f"; best {best:.3f} at step {steps[values.index(best)]}"
            if last > first + FALL:
                return SummaryLine("Learns", text, "good")
            return SummaryLine("Does not learn", text, "open" if last >= first - FALL else "bad")
    for key, name in LOSSES.items():
        steps, values = _finite(run, key)
        if values:
            text = f"no evaluation; {name} {values[0]:.3g} → {values[-1]:.3g}, steps {steps[0]} to {steps[-1]}"
            return SummaryLine("Learns?", text, "open")
    return SummaryLine("Learns?", "neither an evaluation nor a loss is logged", "open")


def _is_healthy(run: RunRecord) -> SummaryLine:
    spoken = []
    for stop in (event for event in run.events if event["event"] == "guard"):
        # What the guard has found, without its advice.
        why = f" ({stop['reason'].partition(';')[0]})" if isinstance(stop.get("reason"), str) else ""
        spoken.append(f"a guard stopped the run after step {stop['step']}{why}")
    sick = [f"{title} (since step {since})" for title, since in sick_figures(run)]
    if spoken or sick:
        return SummaryLine("Sick", "; ".join(spoken + sick), "bad")
    num_steps = max((len(steps) for steps, _ in run.metrics.values()), default=0)
    if num_steps < FEWEST:
        text = f"no guard has spoken; too few steps for most rules, {num_steps} of {FEWEST}"
        return SummaryLine("Healthy?", text, "open")
    return SummaryLine("Healthy", "no guard has spoken, and no figure is sick", "good")


def _changed(run: RunRecord) -> SummaryLine:
    parts: dict[str, str] = {}
    for key, name in CHANGES.items():
        values = run.values(key)
        if values:
            parts.setdefault(name, f"{name} {values[0]:.3g} → {values[-1]:.3g}")
    return SummaryLine("Changed", ", ".join(parts.values()) or "neither entropy nor length is logged", "open")


def _finite(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    steps, values = run.metrics.get(key, ([], []))
    return [step for step, value in zip(steps, values, strict=True) if math.isfinite(value)], run.values(key)
