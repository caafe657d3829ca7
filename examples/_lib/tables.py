# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The results of an example: tables of measurements, transcripts and curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from _lib.command_line import console
from _lib.curves import ENTROPY, GREEDY, SAMPLED, Panel, plot_curves
from _lib.measurement import Measurement, measure
from _lib.pretraining import Base
from _lib.variants import Outcome, Variant, run_variant
from megatron_selfdistill.metrics.run_log import read_metrics

COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "greedy": lambda m: f"{m.greedy:.3f}",
    "sampled": lambda m: f"{m.sampled:.3f}",
    "pass@8": lambda m: f"{m.pass_at_8:.3f}",
    "different": lambda m: f"{m.different:.1f}",
    "hinted": lambda m: f"{m.hinted:.2f}",
    "entropy": lambda m: f"{m.entropy:.3f}",
    "work": lambda m: f"{m.shows_work:.2f}",
    "length": lambda m: f"{m.length:.1f}",
}
MEANING = {
    "greedy": "accuracy without hints",
    "sampled": "the same at temperature 1",
    "pass@8": "one of 8 samples is right",
    "different": "different right answers among the samples of a problem",
    "hinted": "sampled accuracy with the hint",
    "entropy": "nats per token",
    "work": "share of samples that show their work",
    "length": "tokens",
    "seconds": "wall time of training",
}
ALL_BUT_DIFFERENT = tuple(name for name in COLUMNS if name != "different")


def compare(
    title: str,
    base: Base,
    variants: Sequence[Variant],
    directory: Path,
    *,
    columns: Sequence[str] = ALL_BUT_DIFFERENT,
    panels: Sequence[Panel] = (GREEDY, SAMPLED, ENTROPY),
    num_samples: int = 8,
    before: Measurement | None = None,
) -> tuple[Measurement, list[Outcome]]:
    """Run the variants in ``directory``, show one table and write ``directory/curves.png``.

    Returns the measurement of the base, which is ``before`` where the caller has it, and the outcomes.
    """
    before = before or measure(base, num_samples=num_samples)
    outcomes = [run_variant(variant, base, directory, num_samples=num_samples) for variant in variants]
    console.print()
    console.print(comparison(title, before, outcomes, columns))
    runs = {outcome.variant.title: outcome.run_dir for outcome in outcomes}
    console.print(f"curves: {plot_curves(runs, directory / 'curves.png', panels, title)}\n", soft_wrap=True)
    return before, outcomes


def comparison(title: str, before: Measurement, outcomes: Sequence[Outcome], columns: Sequence[str]) -> Table:
    """Return a table with a row for the base and a row for each variant."""
    names = (*columns, "seconds")
    table = new_table(title, names, caption="; ".join(f"{name}: {MEANING[name]}" for name in names))
    table.add_row("before", *(COLUMNS[name](before) for name in columns), "")
    for outcome in outcomes:
        cells = [COLUMNS[name](outcome.measurement) for name in columns]
        table.add_row(label(outcome), *cells, f"{outcome.seconds:.0f}")
    return table


def accuracy_by_step(title: str, outcomes: Sequence[Outcome], steps: Sequence[int]) -> Table:
    """Return a table of the logged greedy accuracy at some steps; a cell is empty where a run did not evaluate."""
    table = new_table(title, [f"step {step}" for step in steps])
    for outcome in outcomes:
        logged = {m["step"]: m[GREEDY.key] for m in read_metrics(outcome.run_dir) if GREEDY.key in m}
        table.add_row(label(outcome), *(f"{logged[step]:.2f}" if step in logged else "" for step in steps))
    return table


def new_table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """Return a table with a column of labels and a column of numbers for each name."""
    left = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title, title_style="bold", caption=caption, **left)  # type: ignore[arg-type]
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def label(outcome: Outcome) -> str:
    """Return the title of the variant, marked where a guard stopped its run."""
    return outcome.variant.title + (" (stopped)" if outcome.stopped else "")


def show_transcripts(before: Measurement, after: Measurement, count: int = 4) -> None:
    """Show the greedy responses to the first held-out problems, before and after training."""
    table = Table(title="The first held-out problems, greedy", title_justify="left", title_style="bold")
    for name in ("problem", "before", "after"):
        table.add_column(name, no_wrap=True)
    for old, new in list(zip(before.transcripts, after.transcripts, strict=True))[:count]:
        responses = [f"[green]{escape(t.response)} ✓" if t.correct else f"{escape(t.response)} ✗" for t in (old, new)]
        table.add_row(escape(old.prompt), *responses)
    console.print(table)
