# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Curves of several runs side by side, from the metrics.jsonl of each: one panel per metric, one colour per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_selfdistill.metrics.run_log import read_metrics


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: a metric over the steps."""

    key: str
    """The key of the metric in metrics.jsonl, such as entropy/student."""
    title: str
    share: bool = False
    """Whether the metric is a share, so that the axis runs from 0 to 1."""
    smoothing: int = 1
    """The number of logged values, up to the step of a point, whose mean the point shows."""


GREEDY = Panel("evaluation/greedy_accuracy", "held-out accuracy, greedy", share=True)
SAMPLED = Panel("evaluation/sampled_accuracy", "held-out accuracy, sampled (T = 1)", share=True)
ENTROPY = Panel("entropy/student", "entropy, nats per token", smoothing=5)
LOSS = Panel("loss/mean", "loss, nats per token", smoothing=5)


def plot_curves(
    runs: Mapping[str, str | Path],
    path: str | Path,
    panels: Sequence[Panel] = (GREEDY, SAMPLED, ENTROPY),
    title: str | None = None,
    dpi: int = 110,
) -> Path:
    """Draw one picture, whose format is the suffix of ``path``, and return its path.

    ``runs``: label -> run directory, in the order of the legend.  A panel skips a run that lacks the panel's metric; a
    baseline, for example, has no entropy.  A curve ends at the last step of its run, even if a guard stopped the run.
    Raises: ValueError, which names the metrics, if no run has any of them.
    """
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    logged = {label: read_metrics(run_dir) for label, run_dir in runs.items()}
    curves = {panel.key: {label: curve(lines, panel) for label, lines in logged.items()} for panel in panels}
    if not any(steps for of_panel in curves.values() for steps, _ in of_panel.values()):
        raise ValueError(
            f"plot_curves: expected runs that logged {', '.join(panel.key for panel in panels)}, got none of these "
            f"in {', '.join(str(run_dir) for run_dir in runs.values())}; look for their metrics.jsonl."
        )
    figure = Figure(figsize=(4.3 * len(panels), 3.7), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, label in enumerate(runs):
            steps, values = curves[panel.key][label]
            if steps:
                marker = "o" if len(steps) < 20 else None
                axis.plot(steps, values, color=f"C{number}", marker=marker, markersize=3.5, label=label)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim((0, 1.02) if panel.share else (0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    in_order = [label for label in runs if label in handles]
    figure.legend([handles[label] for label in in_order], in_order, loc="outside lower center", ncols=3, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)


def curve(lines: Sequence[Mapping[str, float]], panel: Panel) -> tuple[list[float], list[float]]:
    """Return (steps, values) of a panel's metric, smoothed by ``panel.smoothing``; both empty without the metric."""
    points = [(line["step"], line[panel.key]) for line in lines if panel.key in line]
    values = [value for _, value in points]
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - panel.smoothing) : end]
        means.append(sum(window) / len(window))
    return [step for step, _ in points], means
