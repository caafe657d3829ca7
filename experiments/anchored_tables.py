# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write tables of docs/method.md, docs/results.md and tables/, and two pictures, from the lines of anchored_map.py.

    python experiments/anchored_tables.py              the tables and both pictures
    python experiments/anchored_tables.py --check      compare the tables only; the status is 1 if they differ

A table stands between <!-- table NAME --> and <!-- end NAME --> in a page; NAME is one of `TABLES`, ablations, sweep,
flips, clipped, whose lines are those of clipped_opsd.py, or controls, compared, again and long, whose lines are those
of control_map.py.  A table shows the seeds that have a line for every arm of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import clipped_opsd
import control_tables
from anchored_experiments import ABLATIONS, EXPERIMENTS, WITH_ABLATIONS
from anchored_map import LINES, arms_of
from cell_lines import DOCS, FURTHER_TABLES, Line, read_lines
from leak_sweep import logit
from page_tables import complete, markdown, seeds_of, short, spread, write_or_compare

PAGES = (DOCS / "method.md", DOCS / "results.md", FURTHER_TABLES / "controls.md", FURTHER_TABLES / "thinking.md")
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
    "anchored_matched_w025": "anchored, matched, w = .25",
    "student_matched_guided": "mix with the student, matched, guided rollouts",
    "student_matched_forward_guided": "mix with the student, matched, forward KL, guided rollouts",
    "rft": "RFT with a verifier",
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
}
"""Figure of a line -> heading of its column."""


HIDDEN = ("student_strict", "student_matched_guided")
"""The arms of the recorded results that no table shows."""


@dataclass(frozen=True)
class Part:
    """The columns of a table that show the last step of one or more experiments, whose arms are different."""

    experiments: tuple[str, ...]
    label: str
    figures: tuple[str, ...]


TABLES = {
    "leak": (
        Part(("leak",), "400 steps", ("greedy", "sampled", "shows_work")),
        Part(("leak_long",), "1000 steps", ("shows_work",)),
    ),
    "unsolved": (
        Part(("unsolved", "unsolved_guided"), "right hints", ("greedy", "sampled")),
        Part(("unsolved_leaking", "unsolved_leaking_guided"), "leaking hints", ("greedy", "shows_work")),
        Part(("unsolved_wrong", "unsolved_wrong_guided"), "wrong hints", ("sampled",)),
    ),
    "choosing": (
        Part(("choosing",), "H", ("within_3", "overlooked", "fork_entropy")),
        Part(("choosing_surer",), "K", ("within_3", "overlooked")),
    ),
    "price": (
        Part(("quickstart",), "quickstart", ("sampled",)),
        Part(("wrong_hints",), "wrong hints", ("sampled",)),
        Part(("wrong_hints_forward",), "wrong hints, forward KL", ("sampled",)),
        Part(("hard",), "hard problems", ("sampled",)),
        Part(("many_answers",), "many answers", ("sampled", "different")),
        Part(("chat_logs",), "chat logs", ("sampled",)),
    ),
}
"""Name of a table of the page -> its columns."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and the pictures, or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 if a table differs")
    options = parser.parse_args(argv)
    lines = read_lines(LINES)
    status = write_or_compare(*PAGES, rows_of=lambda name: rows_of(name, lines), compare=options.check)
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
    if name in control_tables.TABLES:
        return control_tables.TABLES[name](read_lines(control_tables.LINES))
    if name == "compared":
        return control_tables.table_of_comparison(read_lines(control_tables.LINES), lines)
    if name == "flips":
        return flips()
    if name == "ablations":
        return ablations(lines)
    if name == "sweep":
        return [differences(lines_of("sweep", lines))]
    return table(TABLES[name], lines)


def lines_of(name: str, lines: Sequence[Line]) -> list[Line]:
    """Return the lines of an experiment, of the seeds that have a line for each of its arms.

    Raises: ValueError, which names the experiment, if no seed has all lines.
    """
    found = complete([line for line in lines if line["experiment"] == name], arms_of(name))
    if not found:
        raise ValueError(f"experiment {name}: expected a seed with a line for every arm, got none")
    return found


def ablations(lines: Sequence[Line]) -> list[str]:
    """Return a table with a row for each task: the base, the default, and its ablations on the same seeds.

    Problems that the base never solves have the row of guided rollouts, w = 2 and forward KL, since reverse KL teaches
    none of them.
    """
    rows: list[list[str]] = []
    for name, arms in WITH_ABLATIONS.items():
        of_ablations = lines_of(f"{name}_ablations", lines)
        seeds = {line["seed"] for line in of_ablations}
        of_task = [line for line in lines if line["experiment"] in (name, f"{name}_guided") and line["seed"] in seeds]
        figure = "within_3" if name.startswith("choosing") else "sampled"
        prefix, arm, more = "", DEFAULT, ""
        if "guided_no_hint" in arms:
            prefix, arm, more = "guided_", f"{DEFAULT}_forward_w2_guided", ": guided rollouts, w = 2, forward KL"
        shown = [
            spread([value_of(line, figure) for line in found if line["arm"] == which])
            for found, which in (
                *((of_ablations, "base"), (of_task, arm)),
                *((of_ablations, f"{prefix}{ablation}") for ablation in ABLATIONS),
            )
        ]
        rows.append([EXPERIMENTS[name].title + more, *shown])
    rows[:0] = [["task", "before", "the hint", "another problem's hint", "no hint"], ["---"] * 5]
    return markdown(rows)


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
    for arm in dict.fromkeys(line["arm"] for line in every if line["arm"] not in HIDDEN):
        cells = []
        for part, of_part in zip(parts, found, strict=True):
            # One base for each seed: that of the first experiment.
            of_arm = {line["seed"]: line for line in reversed(of_part) if line["arm"] == arm}.values()
            cells += [spread([value_of(line, figure) for line in of_arm]) for figure in part.figures]
        rows.append(f"| {' | '.join([NAMES[arm], *cells])} |")
    return rows


def value_of(line: Line, figure: str) -> float:
    """Return a figure of a line after the last step."""
    value: float | list[float] = line[figure]
    return value[-1] if isinstance(value, list) else value


def differences(lines: Sequence[Line]) -> str:
    """Return the sentence about the differences between closed form and measurement, over all seeds and classes."""
    found = [abs(line["leak"][-1][name] - line["predicted"][name]) for line in lines for name in line["own"]]
    return (
        f"Over the {len(found)} pairs of a closed form and a measured share, the mean difference is "
        f"{short(mean(found))} and the largest {short(max(found))}."
    )


if __name__ == "__main__":
    sys.exit(main())
