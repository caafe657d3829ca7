# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The picture of docs/real_model.md: what every target taught a real model, and what it changed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchored_pictures import finish

Line = Mapping[str, Any]
PANELS = {
    "sampled": "sampled answers that are\none short sentence",
    "kept_length": "tokens of the answers to\ngeneral questions, at most 64",
    "kept_perplexity": "perplexity of a text\nin plain English",
}
"""Figure of a line -> title of its panel."""
RANGES = {"sampled": (-0.03, 1.03), "kept_length": (0, 66), "kept_perplexity": (0, 40)}


def draw_targets(lines: Sequence[Line], labels: Mapping[str, str], path: Path) -> None:
    """Draw a row for each arm of ``labels`` that has a line, from the top, with a point for each seed."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    arms = [arm for arm in labels if any(line["arm"] == arm for line in lines)]
    figure = Figure(figsize=(11.5, 0.62 * len(arms) + 1.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for row, arm in enumerate(arms):
            values = [line[key] for line in lines if line["arm"] == arm]
            axis.plot(values, [row] * len(values), "o", color=f"C{row}", alpha=0.65, markersize=9)
        finish(axis, title)
        axis.set_xlim(*RANGES[key])
    axes[0].set_yticks(range(len(arms)), [labels[arm] for arm in arms])
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.savefig(path)
