# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table of thinking: the means of the seeds, and which arms have lost attempts, forks or accuracy."""

from __future__ import annotations

from pathlib import Path

from scripts import load_script

TOOL = load_script(Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "thinking_table.py")
NAMES = {"base": "before", "kept": "kept", "lost": "lost"}


def shown(values: list[float]) -> str:
    """Return the values of all seeds with two digits."""
    return " ".join(f"{value:.2f}" for value in values)


def line_of(arm: str, seed: int, *, within_3: float, attempts: float = 2.0, fork_entropy: float = 1.0) -> dict:
    """Return a line with two steps, of which the last one has the given figures."""
    several = {"within_1": 0.25, "within_2": 0.4, "within_3": within_3, "greedy": 0.5, "attempts": attempts}
    return {
        "arm": arm,
        "seed": seed,
        "step": [50, 100],
        "overlooked": [0.2, 0.2],
        "fork_entropy": fork_entropy,
        **{name: [0.0, value] for name, value in several.items()},
    }


def test_an_arm_loses_what_is_below_nine_tenths_of_the_best():
    lines = [
        line_of("base", 11, within_3=0.50),
        line_of("kept", 11, within_3=0.60, attempts=1.9, fork_entropy=0.95),
        line_of("lost", 11, within_3=0.53, attempts=1.7, fork_entropy=0.95),
    ]
    heading, _, base, kept, lost = TOOL.thinking_table(lines, NAMES, shown)
    assert heading.startswith("| step 100, seeds 11 | one attempt |")
    assert base.endswith("| 1.00 | three attempts |")
    assert kept == "| kept | 0.25 | 0.40 | 0.60 | 0.50 | 1.90 | 0.20 | 0.95 | nothing |"
    assert lost.endswith("| 0.95 | attempts, three attempts |")


def test_a_cell_shows_all_seeds_and_losses_are_of_their_means():
    lines = [line_of("base", seed, within_3=0.6) for seed in (11, 12)]
    lines += [line_of("kept", 11, within_3=0.5), line_of("kept", 12, within_3=0.6)]
    lines += [line_of("lost", 11, within_3=0.4), line_of("lost", 12, within_3=0.6)]
    heading, _, base, kept, lost = TOOL.thinking_table(lines, NAMES, shown)
    assert "seeds 11, 12 |" in heading
    assert base.startswith("| before | 0.25 0.25 | 0.40 0.40 | 0.60 0.60 |")
    assert kept.endswith("| nothing |")
    assert lost.endswith("| three attempts |")
