# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pictures of docs/results.md: the leak over the steps, and the sweep against its closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Line = Mapping[str, Any]
PANELS = {
    "greedy": "held-out accuracy, greedy",
    "sampled": "held-out accuracy, sampled (T = 1)",
    "shows_work": "share of samples that show their work",
}


def draw_leak(lines: Sequence[Line], names: Mapping[str, str], path: Path) -> None:
    """Draw each arm of the leak over the steps: the mean over the seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    figure = Figure(figsize=(4.3 * len(PANELS), 3.9), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != "base"]
    before = {line["seed"]: line for line in lines if line["arm"] == "base"}
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for number, arm in enumerate(arms):
            runs = [line for line in lines if line["arm"] == arm]
            steps = [0, *runs[0]["step"]]
            at_step = list(zip(*([before[run["seed"]][key][0], *run[key]] for run in runs), strict=True))
            style = "-" if arm.startswith("anchored") else "--"
            band(axis, steps, at_step, style, f"C{number}", names[arm])
        finish(axis, title)
        axis.set_xlabel("step")
        axis.set_ylim(0, 1.02)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path)


def draw_sweep(lines: Sequence[Line], path: Path) -> None:
    """Draw the measured share of responses without work against the closed form: a panel for each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False)[0]
    for axis, (rule, title) in zip(axes, {"fixed": "k = 1 + w", "matched": "matched, k <= 1 + w"}.items(), strict=True):
        weights = sorted({arm_parts(line)[1] for line in lines})
        for number, weight in enumerate(weights):
            of_arm = [line for line in lines if arm_parts(line)[:2] == (rule, weight)]
            points = [(line["predicted"][name], line["leak"][-1][name]) for line in of_arm for name in line["own"]]
            across, up = [point[0] for point in points], [point[1] for point in points]
            axis.scatter(across, up, s=14, alpha=0.6, color=f"C{number}", label=f"w = {weight:g}")
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        finish(axis, title)
        axis.set_xlabel("closed form of the target")
        axis.set_ylabel("share without work after training")
        axis.legend(fontsize=9)
    figure.savefig(path)


def arm_parts(line: Line) -> tuple[str, float, str]:
    """Return rule, w and mark of an arm of the sweep, such as matched_w0.75_S."""
    rule, weight, mark = line["arm"].split("_")
    return rule, float(weight[1:]), mark


def band(
    axis: Any, steps: Sequence[int], at_step: Sequence[Sequence[float]], style: str, color: str, label: str
) -> None:
    """Draw the mean of the seeds at each step, and a band from the lowest to the highest."""
    axis.plot(steps, [mean(values) for values in at_step], style, color=color, label=label)
    axis.fill_between(steps, list(map(min, at_step)), list(map(max, at_step)), color=color, alpha=0.15)


def finish(axis: Any, title: str) -> None:
    """Set the title and the frame of a panel."""
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
