# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Train runs that fail on purpose, and draw what each of them shows: the picture of docs/troubleshooting.md.

Each failure changes one thing of the quickstart, or of examples/09_leaking_hint.py, and runs without guards.  A run is
one line of results/failure_gallery.jsonl: its accuracy at `MOMENTS`, and at every step the metric that shows the
failure best.  A panel compares this metric with that of the healthy run of the same task.

    python experiments/failure_gallery.py              the missing runs, a minute each, and the picture
    python experiments/failure_gallery.py --picture    the picture alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from anchored_pictures import finish
from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines

from megatron_selfdistill.metrics.run_log import read_metrics

sys.path[:0] = [str(REPOSITORY / "examples")]

LINES, PICTURE = RESULTS / "failure_gallery.jsonl", DOCS / "failures.png"
SEED, NUM_STEPS = 5, 150
MOMENTS = (0, 10, 25, 50, 75, 100, 125, 150)


@dataclass(frozen=True)
class Failure:
    """A run that fails: its panel's title, the metric that shows it with a name, and the overrides that cause it."""

    title: str
    metric: str
    name: str
    overrides: tuple[str, ...]
    leaks: bool = False
    """Whether the run trains the base of examples/09_leaking_hint.py."""


FAILURES: Mapping[str, Failure] = {
    "follows_itself": Failure(
        "the teacher follows the student\n(recipe=literal)", "entropy/student", "entropy, nats", ("recipe=literal",)
    ),
    "rate_too_high": Failure(
        "the learning rate is 30 times too high", "loss/mean", "loss, nats per token", ("optimizer.lr=1e-2",)
    ),
    "rate_too_low": Failure(
        "the learning rate is 300 times too low", "loss/mean", "loss, nats per token", ("optimizer.lr=1e-6",)
    ),
    "unread": Failure(
        "the teacher cannot read its prompt\n(data.solutions=none)",
        *("loss/mean", "loss, nats per token"),
        ("data.solutions=none",),
    ),
    "shuffled": Failure(
        "each hint belongs to another problem\n(data.solutions=other)",
        *("loss/mean", "loss, nats per token"),
        ("data.solutions=other",),
    ),
    "leak": Failure(
        "the hint leaks\n(target.anchor=student)",
        *("response/length_mean", "tokens of a response"),
        ("target.anchor=student",),
        leaks=True,
    ),
}
HEALTHY = {False: "healthy", True: "healthy_leaking"}
"""Whether the hint leaks -> the name of the run of the default with which failures are compared."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the missing runs and draw the picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lines", type=Path, default=LINES, help="(default: experiments/results/failure_gallery.jsonl)"
    )
    parser.add_argument("--directory", type=Path, default=Path("runs/failure_gallery"), help="bases and runs")
    parser.add_argument("--picture", action="store_true", help="draw the picture and run nothing")
    options = parser.parse_args(argv)
    if not options.picture:
        runs: dict[str, tuple[tuple[str, ...], bool]] = {HEALTHY[False]: ((), False), HEALTHY[True]: ((), True)}
        runs |= {name: (failure.overrides, failure.leaks) for name, failure in FAILURES.items()}
        done = {line["run"] for line in read_lines(options.lines)}
        for name, (overrides, leaks) in runs.items():
            if name not in done:
                run_dir = options.directory / name
                append_line(options.lines, trained(name, overrides, leaks, options.directory, run_dir), run_dir)
    draw({line["run"]: line for line in read_lines(options.lines)}, PICTURE)
    return 0


def trained(name: str, overrides: Sequence[str], leaks: bool, root: Path, run_dir: Path) -> Line:
    """Train a run and return its line."""
    from _lib import leaking_subtraction, subtraction
    from _lib.command_line import prepare_process
    from _lib.pretraining import prepared_base, write_records
    from _lib.variants import Variant
    from _lib.watched_runs import WITHOUT_GUARDS, watch

    prepare_process()
    task = leaking_subtraction.TASK if leaks else subtraction.TASK
    base = prepared_base(task, SEED, root)
    problems = write_records(root / f"{task.name}.jsonl", task.training_problems(SEED))
    variant = Variant(name, (*overrides, *WITHOUT_GUARDS)).on(problems)
    points = watch(variant, base, run_dir, MOMENTS)
    steps = read_metrics(run_dir)
    wanted = sorted({failure.metric for failure in FAILURES.values()})
    curves = {key: [round(step[key], 6) for step in steps if key in step] for key in wanted}
    sampled = [round(point.sampled, 3) for point in points]
    return {"run": name, "seed": SEED, "overrides": list(overrides), "sampled": sampled, "curves": curves}


def draw(lines: Mapping[str, Line], path: Path) -> None:
    """Draw two panels for each failure: its accuracy, and the metric that shows it; grey is the healthy run."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    figure = Figure(figsize=(12.6, 8.4), dpi=110, layout="constrained")
    grid = figure.subplots(4, 3, squeeze=False)
    for place, (name, failure) in enumerate(FAILURES.items()):
        above, below = grid[place // 3 * 2][place % 3], grid[place // 3 * 2 + 1][place % 3]
        for run, color, width in ((HEALTHY[failure.leaks], "0.65", 1.5), (name, "C3", 2)):
            above.plot(MOMENTS, lines[run]["sampled"], color=color, linewidth=width)
            curve = lines[run]["curves"][failure.metric]
            below.plot(range(1, len(curve) + 1), smooth(curve), color=color, linewidth=width)
        finish(above, failure.title)
        finish(below, "")
        above.set_ylim(0, 1.02)
        above.set_ylabel("accuracy, sampled", fontsize=9)
        below.set_ylabel(failure.name, fontsize=9)
        below.set_xlabel("step", fontsize=9)
        below.set_yscale("log" if failure.metric == "loss/mean" else "linear")
    figure.savefig(path)


def smooth(curve: Sequence[float]) -> list[float]:
    """Return the running median of a curve over five steps."""
    return [median(curve[max(0, n - 2) : n + 3]) for n in range(len(curve))]


if __name__ == "__main__":
    sys.exit(main())
