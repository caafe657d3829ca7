# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Repeat the run of docs/tutorial.md with other seeds and with controls, and draw its picture.

A run is one line of results/tutorial.jsonl: the evaluations at each of their steps.  The directory of a run is removed
once its line is there.

    python experiments/tutorial_runs.py --hf runs/real_model/hf     the missing runs, 15 minutes each on two idle cores
    python experiments/tutorial_runs.py --picture                   the picture, and the means of the last step
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchored_pictures import band, finish
from cell_lines import DOCS, REPOSITORY, RESULTS, append_line, read_lines
from page_tables import spread

from megatron_selfdistill.metrics.run_log import read_metrics

LINES, PICTURE = RESULTS / "tutorial.jsonl", DOCS / "tutorial.png"
TUTORIAL = REPOSITORY / "examples" / "tutorial"
ARMS: Mapping[str, tuple[str, ...]] = {
    "the run of this page": (),
    "control: another instruction": ("data.path=other.jsonl",),
}
SEEDS = (0, 1, 2)
FIGURES = {
    "evaluation/greedy_accuracy": "greedy answers with three points",
    "evaluation/sampled_accuracy": "sampled answers with three points",
    "evaluation/greedy_mean_length": "tokens of a greedy answer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train the missing runs, or draw the picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", default="runs/real_model/hf", help="the Hugging Face directory of the model")
    parser.add_argument("--directory", type=Path, default=Path("runs/tutorial"), help="problems and runs")
    parser.add_argument("--arms", type=int, nargs="+", default=list(range(len(ARMS))), help="numbers of arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--picture", action="store_true", help="draw the picture and run nothing")
    options = parser.parse_args(argv)
    if not options.picture:
        options.directory.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in (list(ARMS)[number] for number in options.arms):
                if not any((line["arm"], line["seed"]) == (arm, seed) for line in read_lines(LINES)):
                    hf, run_dir = str(Path(options.hf).resolve()), f"{list(ARMS).index(arm)}-seed{seed}"
                    line = run(arm, seed, hf, options.directory, run_dir)
                    append_line(LINES, line, options.directory / run_dir)
    lines = read_lines(LINES)
    for arm in ARMS:
        of_arm = [line for line in lines if line["arm"] == arm]
        if of_arm:
            print(f"{arm}, {len(of_arm)} seeds: {[spread([line[key][-1] for line in of_arm]) for key in FIGURES]}")
    draw(lines)
    return 0


def run(arm: str, seed: int, hf: str, directory: Path, run_dir: str) -> dict[str, Any]:
    """Train the run ``run_dir`` in ``directory``, or find it; return its line."""
    places = os.pathsep.join([str(REPOSITORY), str(TUTORIAL), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": places}
    if not (directory / "problems.jsonl").exists():
        subprocess.run([sys.executable, str(TUTORIAL / "three_points.py")], cwd=directory, check=True, env=environment)
    command = [sys.executable, "-m", "megatron_selfdistill", "train", str(TUTORIAL / "three_points.yaml")]
    command += [f"model={hf}", f"run_dir={run_dir}", f"seed={seed}", *ARMS[arm]]
    subprocess.run(command, cwd=directory, check=True, env=environment)
    evaluated = [it for it in read_metrics(directory / run_dir) if "evaluation/greedy_accuracy" in it]
    curves = {key: [round(record[key], 4) for record in evaluated] for key in FIGURES}
    return {"arm": arm, "seed": seed, "steps": [record["step"] for record in evaluated], **curves}


def draw(lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw a panel for each figure: the mean of the seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    figure = Figure(figsize=(4.2 * len(FIGURES), 3.6), dpi=110, layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(FIGURES), squeeze=False)[0], FIGURES.items(), strict=True):
        for number, arm in enumerate(ARMS):
            curves = [line[key] for line in lines if line["arm"] == arm]
            if curves:
                steps = next(line["steps"] for line in lines if line["arm"] == arm)
                at_step = list(zip(*curves, strict=True))
                band(axis, steps, at_step, "-" if number == 0 else "--", f"C{number}", arm)
        finish(axis, title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    sys.exit(main())
