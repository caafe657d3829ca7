# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write the tables and pictures of docs/anchored.md from the lines of docs/anchored_map.jsonl.

    python tools/benchmarks/anchored_tables.py              the tables and both pictures
    python tools/benchmarks/anchored_tables.py --check      compare the tables only; the status is 1 where they differ

A table stands between <!-- table NAME --> and <!-- end NAME --> in the page; NAME is an experiment of anchored_map.py.
A table shows the seeds that have a line for every arm in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import mean

from anchored_map import LINES, arms_of
from cell_lines import DOCS, Line, read_lines
from leak_sweep import logit
from page_tables import complete, seeds_of, short, spread, write_or_compare
from thinking_table import thinking_table

PAGE = DOCS / "anchored.md"
NAMES = {
    "base": "before",
    "teacher_alone": "teacher alone",
    "student_matched": "mix with the student, matched",
    "student_strict": "mix with the student, strict match",
    "anchored_fixed": "anchored, k = 1 + w",
    "anchored_matched": "anchored, matched",
    "anchored_strict": "anchored, strict match",
    "anchored_matched_w2": "anchored, matched, w = 2",
    "teacher_alone_forward": "teacher alone, forward KL",
    "student_matched_forward": "mix with the student, matched, forward KL",
    "anchored_matched_forward": "anchored, matched, forward KL",
    "anchored_matched_forward_w2": "anchored, matched, forward KL, w = 2",
    "anchored_matched_forward_guided": "anchored, matched, forward KL, guided rollouts",
    "anchored_matched_forward_w2_guided": "anchored, matched, forward KL, w = 2, guided rollouts",
    "anchored_matched_per_problem": "anchored, matched; unsolved problems: forward KL, w = 2, guided rollouts",
    "anchored_matched_w025": "anchored, matched, w = .25",
    "anchored_matched_refreshed": "matched, refreshed every 100 steps",
    "anchored_fixed_refreshed": "k = 1 + w, refreshed every 100 steps",
    "anchored_matched_averaged": "matched, average of the weights",
    "anchored_fixed_averaged": "k = 1 + w, average of the weights",
    "student_matched_guided": "mix with the student, matched, guided rollouts",
    "student_matched_forward_guided": "mix with the student, matched, forward KL, guided rollouts",
    "rft": "RFT with a verifier",
}
"""Name of an arm -> its label in a table."""
COLUMNS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "shows_work": "work",
    "entropy": "entropy",
    "different": "different",
    "attempts": "attempts",
    "checked": "checked",
    "within_1": "one attempt",
    "within_2": "two attempts",
    "within_3": "three attempts",
}
"""Figure of a line -> heading of its column."""
USUAL = ("greedy", "sampled", "shows_work", "entropy")
FIGURES = {
    "many_answers": ("sampled", "different", "entropy"),
}
"""Experiment -> the figures of its table, where they are not the usual ones."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and the pictures, or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 where a table differs")
    options = parser.parse_args(argv)
    lines = read_lines(LINES)
    status = write_or_compare(PAGE, lambda name: rows_of(name, lines), compare=options.check)
    if options.check:
        return status
    from anchored_pictures import draw_leak, draw_sweep

    draw_leak(lines_of("leak", lines), NAMES, DOCS / "leaking_hint.png")
    draw_sweep(lines_of("sweep", lines), DOCS / "anchored_sweep.png")
    return 0


def rows_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table ``name`` of the page: an experiment's, or that of the weights at which a fork flips.

    Raises: ValueError, which names the experiment, for a table whose experiment has no line.
    """
    if name == "flips":
        return flips()
    of_experiment = lines_of(name, lines)
    if not of_experiment:
        raise ValueError(f"docs/anchored.md has a table {name}: expected a seed with a line for every arm, got none")
    if name == "sweep":
        return [*sweep_table(of_experiment), "", differences(of_experiment)]
    if name in ("choosing", "choosing_surer"):
        return thinking_table(of_experiment, NAMES, spread)
    return table(of_experiment, FIGURES.get(name, USUAL))


def lines_of(name: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of an experiment, of the seeds that have a line for each of its arms."""
    of_experiment = [line for line in lines if line["experiment"] == name]
    return complete(of_experiment, arms_of(name))


def flips() -> list[str]:
    """Return a table of the w at which the matched target of a fork flips to the leak: -logit(r) / logit(t)."""
    hints = (0.7, 0.9, 0.99)
    rows = [
        f"| reference leaks | {' | '.join(f'hint leaks {100 * hint:.0f} %' for hint in hints)} |",
        "|---|---|---|---|",
    ]
    for own in (0.01, 0.03, 0.1, 0.3):
        rows.append(f"| {100 * own:.0f} % | {' | '.join(short(-logit(own) / logit(hint)) for hint in hints)} |")
    return rows


def table(lines: Sequence[Line], figures: Sequence[str]) -> list[str]:
    """Return a table with a row for each arm: the last step's figures, and the best step by sampled accuracy.

    Each cell is the mean over the seeds, with the lowest and the highest seed in brackets.
    """
    steps = max(line["step"][-1] for line in lines)
    headings = [COLUMNS[name] for name in figures]
    rows = [
        f"| step {steps}, {seeds_of(lines)} | {' | '.join(headings)} | best sampled | at step |",
        "|---" * (len(figures) + 3) + "|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = [line for line in lines if line["arm"] == arm]
        cells = [spread([line[name][-1] for line in of_arm]) for name in figures]
        best = [max(zip(line["sampled"], line["step"], strict=True)) for line in of_arm]
        late = ["", ""] if arm == "base" else [spread([value for value, _ in best]), moments([s for _, s in best])]
        rows.append(f"| {NAMES[arm]} | {' | '.join([*cells, *late])} |")
    return rows


def sweep_table(lines: Sequence[Line]) -> list[str]:
    """Return a table of the share of responses without work: closed form, and measured after the last step.

    A row is a class of problems: how often the base leaks without and with the hint.  A column is a rule and a w.
    """
    rules = list(dict.fromkeys(line["arm"].rpartition("_")[0] for line in lines))
    titles = [heading(rule) for rule in rules]
    rows = [
        f"| base, hint ({seeds_of(lines)}) | {' | '.join(titles)} |",
        "|---" * (len(rules) + 1) + "|",
    ]
    for name in sorted({name for line in lines for name in line["own"]}):
        here = [line for line in lines if name in line["own"]]
        leaks = ", ".join(short(mean(line[kind][name] for line in here)) for kind in ("own", "hint"))
        cells = []
        for rule in rules:
            of_rule = [line for line in here if line["arm"].startswith(f"{rule}_")]
            predicted = mean(line["predicted"][name] for line in of_rule)
            cells.append(f"{short(predicted)}: {spread([line['leak'][-1][name] for line in of_rule])}")
        rows.append(f"| {leaks} | {' | '.join(cells)} |")
    return rows


def differences(lines: Sequence[Line]) -> str:
    """Return the sentence about the differences between closed form and measurement, over all seeds and classes."""
    found = [abs(line["leak"][-1][name] - line["predicted"][name]) for line in lines for name in line["own"]]
    return (
        f"Over the {len(found)} pairs of a closed form and a measured share, the mean difference is "
        f"{short(mean(found))} and the largest {short(max(found))}."
    )


def heading(rule: str) -> str:
    """Return the heading of a rule of the sweep, such as matched_w0.75."""
    name, _, weight = rule.partition("_w")
    return f"{'k = 1 + w' if name == 'fixed' else 'matched'}, w = {weight.removeprefix('0')}"


def moments(steps: Sequence[int]) -> str:
    """Return the range of the steps."""
    return str(steps[0]) if len(set(steps)) == 1 else f"{min(steps)} to {max(steps)}"


if __name__ == "__main__":
    sys.exit(main())
