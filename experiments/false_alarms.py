# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure how often the report calls a healthy run sick, and whether it finds the runs that collapse.

The task is the quickstart's.  A trained run is one line of results/false_alarms.jsonl, and is not trained again if its
line is there.  Every healthy run is then resampled: each metric keeps its running median, the distances from it are
drawn anew in blocks of `BLOCK` steps, and every answer of an evaluation is drawn anew.  A last row has curves of noise
alone.  A run is judged after every tenth step, and one verdict "sick" is a false alarm.

    python experiments/false_alarms.py                 every missing run, 15 to 30 s each, then the resampled runs
    python experiments/false_alarms.py --write         write the table into docs/report.md
    python experiments/false_alarms.py --check         the status is 1 if the page has another table
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import write_or_compare

from megatron_selfdistill.instruments.report.figures import GROUPS
from megatron_selfdistill.instruments.report.run_record import RunRecord, read_run
from megatron_selfdistill.instruments.report.run_report import sick_figures

sys.path[:0] = [str(REPOSITORY / "examples")]

LINES, PAGE = RESULTS / "false_alarms.jsonl", DOCS / "report.md"
SMALL = ("data.global_batch_size=8", "evaluation.every=10")
"""The overrides of a run with more noise, which also has `FEW` held-out problems."""
FEW = 32
HEALTHY = {
    "default": (),
    "student_mix": ("target.anchor=student",),
    "teacher_alone": ("recipe=teacher_alone",),
    "forward_kl": ("loss.divergence=forward_kl",),
    "rft": ("method.name=rft",),
    "small_default": SMALL,
    "small_student": (*SMALL, "target.anchor=student"),
    "small_alone": (*SMALL, "recipe=teacher_alone"),
}
COLLAPSED = {
    "literal": ("recipe=literal",),
    "leaking_hint": ("recipe=teacher_alone",),
    "leaking_hint_student": ("target.anchor=student",),
}
"""Arms whose accuracy falls; those of a leaking hint train the base of examples/09_leaking_hint.py without guards."""
SEEDS = {5: range(500, 503), 6: range(600, 603)}
"""The seed of a base -> the seeds of its runs."""
BLOCK, WINDOW, EVERY = 5, 21, 10
NUM_RESAMPLED = 50
"""Resampled runs of each healthy run; `NUM_NOISE` runs have noise alone."""
NUM_NOISE = 2000
ORDINARY = 0.02
"""The share of the responses that have one of the words about a hint by chance."""
EXACT = {"status/unconverged": 0.0, "learning_rate": 1e-5}
"""The metric without noise -> its value in a healthy run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and judge the missing runs, or write or compare the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/false_alarms.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/false_alarms"), help="bases and runs")
    parser.add_argument("--write", action="store_true", help="write the table of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="compare the table of the page and run nothing")
    options = parser.parse_args(argv)
    if options.write or options.check:
        lines = read_lines(options.lines)
        return write_or_compare(PAGE, rows_of=lambda _: rows_of(lines), compare=options.check)
    done = {(line["arm"], line["seed"]) for line in read_lines(options.lines)}
    for arm in (*HEALTHY, *COLLAPSED):
        for base_seed, seed in ((base, seed) for base, seeds in SEEDS.items() for seed in seeds):
            if (arm, seed) not in done:
                run_dir = trained(arm, base_seed, seed, options.directory)
                append_line(options.lines, line_of(arm, seed, read_run(run_dir, arm)), run_dir)
    if ("noise", 0) not in done:
        alarms = [title for n in range(NUM_NOISE) if (title := alarm(noise(random.Random(n)))) is not None]
        append_line(options.lines, {"arm": "noise", "seed": 0, "runs": NUM_NOISE, "alarms": alarms}, options.directory)
    return 0


def trained(arm: str, base_seed: int, seed: int, root: Path) -> Path:
    """Train an arm from the base of a seed, unless its directory is there; return the run directory."""
    from _lib import leaking_subtraction, subtraction
    from _lib.command_line import prepare_process
    from _lib.pretraining import prepared_base, write_records
    from _lib.variants import Variant, train_variant
    from _lib.watched_runs import WITHOUT_GUARDS

    directory = root / f"seed{seed}"
    if (directory / arm / "events.jsonl").exists():
        return directory / arm
    prepare_process()
    leaks = arm.startswith("leaking")
    task = leaking_subtraction.TASK if leaks else subtraction.TASK
    base = prepared_base(task, base_seed, root)
    problems = write_records(root / f"{task.name}-seed{base_seed}.jsonl", task.training_problems(base_seed))
    overrides = [f"seed={seed}", "report.every=0", "metrics.explore_samples=0"]
    overrides += [*WITHOUT_GUARDS, "num_steps=200"] if leaks else []
    if arm.startswith("small"):
        few = [json.loads(line) for line in base.held_out.read_text(encoding="utf-8").splitlines()[:FEW]]
        overrides.append(f"evaluation.path={write_records(root / f'few-seed{base_seed}.jsonl', few)}")
    variant = Variant(arm, (HEALTHY | COLLAPSED)[arm]).on(problems, *overrides)
    run_dir, *_ = train_variant(variant, base, directory)
    for weights in ("checkpoints", "teacher"):
        shutil.rmtree(run_dir / weights, ignore_errors=True)
    return run_dir


def line_of(arm: str, seed: int, run: RunRecord) -> Line:
    """Return the line of a trained run: its own alarm, and those of its resampled runs if it is healthy."""
    line: dict[str, Any] = {"arm": arm, "seed": seed, "runs": 1, "alarm": alarm(run)}
    if arm in HEALTHY:
        again = (alarm(resampled(run, random.Random(f"{seed}/{n}"))) for n in range(NUM_RESAMPLED))
        line |= {"resampled": NUM_RESAMPLED, "resampled_alarms": [title for title in again if title is not None]}
    return line


def alarm(run: RunRecord) -> str | None:
    """Return the first figure that is sick, or "guard", at a look after every `EVERY` steps; None without one."""
    if any(event["event"] == "guard" for event in run.events):
        return "guard"
    for last in range(EVERY, run.last_step + EVERY, EVERY):
        for title, _ in sick_figures(until(run, last)):
            return title
    return None


def until(run: RunRecord, last: int) -> RunRecord:
    """Return the run as it is after ``last`` steps."""
    cut = {}
    for key, (steps, values) in run.metrics.items():
        number = sum(step <= last for step in steps)
        if number:
            cut[key] = steps[:number], values[:number]
    return dataclasses.replace(run, metrics=cut)


def resampled(run: RunRecord, rng: random.Random) -> RunRecord:
    """Return a run with the medians of ``run`` over the steps, and other noise of the same kind."""
    shares = run.values("evaluation/greedy_accuracy")
    number = next(n for n in range(1, 1000) if all(abs(n * share - round(n * share)) < 1e-6 for share in shares))
    metrics = {}
    for key, (steps, values) in run.metrics.items():
        if key in EXACT or key.startswith(("seconds", "tokens", "memory")):
            drawn = list(values)
        elif key.startswith("evaluation"):
            drawn = [evaluated(key, value, number, rng) for value in values]
        else:
            drawn = list(redrawn(values, rng))
        metrics[key] = steps, drawn
    return dataclasses.replace(run, metrics=metrics)


def evaluated(key: str, mean: float, number: int, rng: random.Random) -> float:
    """Return a mean over ``number`` answers whose expectation is ``mean``."""
    if "leak_words" in key:
        return 1000 * answers(ORDINARY, number, rng) / 22  # tokens of a response
    return answers(mean, number, rng) if 0 < mean < 1 else mean


def answers(share: float, number: int, rng: random.Random) -> float:
    """Return the share of ``number`` answers that are drawn with the probability ``share``."""
    return sum(rng.random() < share for _ in range(number)) / number


def redrawn(values: Sequence[float], rng: random.Random) -> Iterator[float]:
    """Yield the running medians with distances that are drawn in blocks, within the range of the values."""
    half = WINDOW // 2
    middle = [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    distances: list[float] = []
    while len(distances) < len(values):
        start = rng.randrange(max(1, len(values) - BLOCK))
        distances += [values[i] - middle[i] for i in range(start, min(len(values), start + BLOCK))]
    for centre, distance in zip(middle, distances, strict=False):
        yield min(max(centre + distance, min(values)), max(values))


def noise(rng: random.Random, lengths: Sequence[int] = (40, 150, 400)) -> RunRecord:
    """Return a run in which nothing changes: heavy tails, small batches and few held-out problems."""
    num_steps, number, batch = rng.choice(lengths), rng.choice((12, FEW, 300)), rng.choice((4, 8, 32))
    steps, evaluations = list(range(1, num_steps + 1)), list(range(0, num_steps + 1, EVERY))
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    shares = {"evaluation/pass_at_8": 0.9, "evaluation/distinct_right": rng.random()}
    for key in sorted({key.replace("*", "8") for figures in GROUPS.values() for one in figures for key in one.metrics}):
        if key.startswith("evaluation_hinted"):
            metrics[key] = [0], [answers(0.6, number, rng)]
        elif key.startswith("evaluation"):
            mean = shares.get(key, 0.35 if "accuracy" in key else 0.05)
            drawn = [22.0 if "length" in key else evaluated(key, mean, number, rng) for _ in evaluations]
            metrics[key] = evaluations, drawn
        elif key in EXACT:
            metrics[key] = steps, [EXACT[key]] * num_steps
        elif key.endswith(("share", "8grams", "leak/words_per_1000", "correction/capped")):
            metrics[key] = steps, [answers(ORDINARY, batch, rng) for _ in steps]
        else:
            falls = (lambda step: 1 + 1 / step) if key == "loss/mean" else (lambda _: 1.0)
            metrics[key] = steps, [falls(step) * rng.lognormvariate(0, 1) for step in steps]
    return RunRecord("noise", {}, metrics, [], [], [])


def rows_of(lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table."""
    healthy = [line for line in lines if line["arm"] in HEALTHY]
    collapsed = [line for line in lines if line["arm"] in COLLAPSED]
    (alone,) = [line for line in lines if line["arm"] == "noise"]
    counts: Mapping[str, tuple[int, int]] = {
        "healthy runs of the quickstart's task": (len(healthy), sum(line["alarm"] is not None for line in healthy)),
        "the same runs, resampled": (
            sum(line["resampled"] for line in healthy),
            sum(len(line["resampled_alarms"]) for line in healthy),
        ),
        "noise alone": (alone["runs"], len(alone["alarms"])),
        "runs that collapse": (len(collapsed), sum(line["alarm"] is not None for line in collapsed)),
    }
    rows = ["| runs | number | called sick at any look |", "|---|---|---|"]
    return rows + [f"| {name} | {number:,} | {sick:,} |" for name, (number, sick) in counts.items()]


if __name__ == "__main__":
    sys.exit(main())
