# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write the tables and pictures of docs/anchored.md from the lines of anchored_map.py and clipped_opsd.py.

    python experiments/anchored_tables.py              the tables and both pictures
    python experiments/anchored_tables.py --check      compare the tables only; the status is 1 if they differ

A table stands between <!-- table NAME --> and <!-- end NAME --> in the page; NAME is one of `TABLES`, sweep, flips or
clipped.  The table controls stands in docs/results.md.
A table shows the seeds that have a line for every arm in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import clipped_opsd
from anchored_experiments import CONTROLS, EXPERIMENTS, WITH_CONTROLS
from anchored_map import LINES, arms_of
from cell_lines import DOCS, Line, read_lines
from leak_sweep import logit
from page_tables import complete, seeds_of, short, spread, write_or_compare

PAGES = (DOCS / "anchored.md", DOCS / "results.md")
DEFAULT = "anchored_matched"
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
    "teacher_alone_forward_guided": "teacher alone, forward KL, guided rollouts",
    "anchored_matched_w025": "anchored, matched, w = .25",
    "anchored_matched_refreshed": "matched, refreshed every 100 steps",
    "anchored_fixed_refreshed": "k = 1 + w, refreshed every 100 steps",
    "anchored_matched_averaged": "matched, average of the weights",
    "anchored_fixed_averaged": "k = 1 + w, average of the weights",
    "student_matched_guided": "mix with the student, matched, guided rollouts",
    "student_matched_forward_guided": "mix with the student, matched, forward KL, guided rollouts",
    "rft": "RFT with a verifier",
    "other_hint": "control: anchored, matched, another problem's hint",
    "no_hint": "control: anchored, matched, no hint",
    "guided_other_hint": "control: the guided row with w = 2, another problem's hint",
    "guided_no_hint": "control: the guided row with w = 2, no hint",
}
"""Name of an arm -> its label in a table."""
HEADINGS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "shows_work": "work",
    "different": "different answers",
    "within_3": "three attempts",
    "overlooked": "overlooked",
    "fork_entropy": "entropy on forks",
    "best": "best sampled",
}
"""Figure of a line -> heading of its column; `best` is the highest sampled accuracy of the steps that were measured."""


@dataclass(frozen=True)
class Part:
    """The columns of a table that show the last step of one or more experiments, whose arms are different."""

    experiments: tuple[str, ...]
    label: str
    figures: tuple[str, ...]


THINKING = ("within_3", "overlooked", "fork_entropy")
TABLES = {
    "leak": (
        Part(("leak", "leak_controls"), "400 steps", ("greedy", "sampled", "shows_work", "best")),
        Part(("leak_long",), "1000 steps", ("sampled", "shows_work")),
    ),
    "leak_refreshed": (Part(("leak_refreshed",), "", ("greedy", "sampled", "shows_work", "best")),),
    "unsolved": (
        Part(("unsolved", "unsolved_guided", "unsolved_controls"), "right hints", ("greedy", "sampled")),
        Part(
            ("unsolved_leaking", "unsolved_leaking_guided", "unsolved_leaking_controls"),
            "leaking hints",
            ("greedy", "shows_work"),
        ),
        Part(
            ("unsolved_wrong", "unsolved_wrong_guided", "unsolved_wrong_controls"), "wrong hints", ("greedy", "sampled")
        ),
    ),
    "choosing": (
        Part(("choosing", "choosing_controls"), "H", THINKING),
        Part(("choosing_surer", "choosing_surer_controls"), "K", THINKING),
    ),
    "price": (
        Part(("quickstart", "quickstart_controls"), "quickstart", ("sampled",)),
        Part(("quickstart_long",), "quickstart, 1000 steps", ("sampled",)),
        Part(("wrong_hints", "wrong_hints_controls"), "wrong hints", ("sampled",)),
        Part(("wrong_hints_forward", "wrong_hints_forward_controls"), "wrong hints, forward KL", ("sampled",)),
        Part(("hard", "hard_controls"), "hard problems", ("sampled",)),
        Part(("many_answers", "many_answers_controls"), "many answers", ("sampled", "different")),
        Part(("chat_logs",), "chat logs", ("sampled",)),
    ),
}
"""Name of a table of the page -> its columns."""
SHOWN = "C"
"""The classes of the sweep that its table has: the base leaks in a tenth of them without the hint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and the pictures, or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 if a table differs")
    options = parser.parse_args(argv)
    lines = read_lines(LINES)
    status = max(write_or_compare(page, lambda name: rows_of(name, lines), compare=options.check) for page in PAGES)
    if options.check:
        return status
    from anchored_pictures import draw_leak, draw_sweep

    draw_leak(lines_of("leak", lines), NAMES, DOCS / "leaking_hint.png")
    draw_sweep(lines_of("sweep", lines), DOCS / "anchored_sweep.png")
    return 0


def rows_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the table ``name`` of the page: of `TABLES`, the sweep, OPSD's clip, or the weights of a flip."""
    if name == "clipped":
        return clipped_opsd.table_of(read_lines(clipped_opsd.LINES))
    if name == "flips":
        return flips()
    if name == "controls":
        return controls(lines)
    if name == "sweep":
        of_sweep = lines_of("sweep", lines)
        return [*sweep_table(of_sweep), "", differences(of_sweep)]
    return table(TABLES[name], lines)


def lines_of(name: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of an experiment, of the seeds that have a line for each of its arms.

    Raises: ValueError, which names the experiment, if no seed has all lines.
    """
    found = complete([line for line in lines if line["experiment"] == name], arms_of(name))
    if not found:
        raise ValueError(f"experiment {name}: expected a seed with a line for every arm, got none")
    return found


def controls(lines: Sequence[Line]) -> list[str]:
    """Return a table with a row for each task: the base, the default, and the default's controls on the same seeds.

    Problems that the base never solves have one more row, with guided rollouts, w = 2 and forward KL.
    """
    rows: list[list[str]] = []
    for name, arms in WITH_CONTROLS.items():
        of_controls = lines_of(f"{name}_controls", lines)
        seeds = {line["seed"] for line in of_controls}
        of_task = [line for line in lines if line["experiment"] in (name, f"{name}_guided") and line["seed"] in seeds]
        figure = "within_3" if name.startswith("choosing") else "sampled"
        for prefix, arm in (("", DEFAULT), ("guided_", f"{DEFAULT}_forward_w2_guided")):
            if f"{prefix}no_hint" in arms:
                shown = [
                    spread([value_of(line, figure) for line in found if line["arm"] == which])
                    for found, which in (
                        *((of_controls, "base"), (of_task, arm)),
                        *((of_controls, f"{prefix}{control}") for control in CONTROLS),
                    )
                ]
                title = EXPERIMENTS[name].title + (": guided rollouts, w = 2, forward KL" if prefix else "")
                rows.append([title, str(len(seeds)), *shown])
    rows[:0] = [["task", "seeds", "before", "the hint", "another problem's hint", "no hint"], ["---"] * 6]
    return [f"| {' | '.join(row)} |" for row in rows]


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


def table(parts: Sequence[Part], lines: Sequence[Line]) -> list[str]:
    """Return a table with a row for each arm and the columns of all ``parts``; a cell is empty if a part lacks the arm.

    Each cell is the mean over the seeds after the last step, with the lowest and the highest seed in brackets.
    """
    found = [[line for name in part.experiments for line in lines_of(name, lines)] for part in parts]
    headings = [
        ": ".join(filter(None, (part.label, HEADINGS[figure] if len(part.figures) > 1 else "")))
        for part in parts
        for figure in part.figures
    ]
    every = [line for of_part in found for line in of_part]
    rows = [f"| {' | '.join([seeds_of(every), *headings])} |", "|---" * (len(headings) + 1) + "|"]
    for arm in dict.fromkeys(line["arm"] for line in every):
        cells = []
        for part, of_part in zip(parts, found, strict=True):
            # One base for each seed: that of the first experiment.
            of_arm = {line["seed"]: line for line in reversed(of_part) if line["arm"] == arm}.values()
            cells += [spread([value_of(line, figure) for line in of_arm]) for figure in part.figures]
        rows.append(f"| {' | '.join([NAMES[arm], *cells])} |")
    return rows


def value_of(line: Line, figure: str) -> float | None:
    """Return a figure of a line after the last step, or the highest sampled accuracy; None for the best of a base."""
    if figure == "best":
        return None if line["arm"] == "base" else max(line["sampled"])
    value: float | list[float] = line[figure]
    return value[-1] if isinstance(value, list) else value


def sweep_table(lines: Sequence[Line]) -> list[str]:
    """Return a table of the share of responses without work: closed form, and measured after the last step.

    A row is a class of problems: how often the base leaks without and with the hint.  A column is a rule and a w.
    The table has the classes of `SHOWN`; the picture has all.
    """
    rules = list(dict.fromkeys(line["arm"].rpartition("_")[0] for line in lines))
    titles = [heading(rule) for rule in rules]
    rows = [
        f"| base, hint ({seeds_of(lines)}) | {' | '.join(titles)} |",
        "|---" * (len(rules) + 1) + "|",
    ]
    for name in sorted({name for line in lines for name in line["own"] if name.startswith(SHOWN)}):
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


if __name__ == "__main__":
    sys.exit(main())
