# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what a real model learns against how far it drifts, step by step: a curve for each target.

This text was written before the first run.  The task is one_sentence of real_map.py, with its settings, for four times
its steps.  At each of `STEPS` the model answers held-out questions, and is compared with the base on general questions,
which no task has: the drift is KL(student || base) in nats, the mean over the tokens of the greedy answers of the base
to 50 questions, of at most 32 tokens.  Arms: the mix with the student (the default where all hints are one text), the
teacher alone, the anchored target with w = .75 and with w = 4, and the mix with another instruction as the hint.

The task canary of real_map.py came in when its first six cells of ten steps had ended without a leak, to see whether
one comes later.  Its arms are the mix with the student, and the teacher alone under forward KL.

A cell is one task, one arm and one seed, and one line of results/frontier.jsonl.

    python experiments/frontier.py                          the missing cells, 45 minutes each on one core
    python experiments/frontier.py --task canary            those of the canary
    python experiments/frontier.py --picture                the picture docs/frontier.png, from the lines
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from anchored_pictures import finish
from cell_lines import DOCS, append_line, read_lines
from real_map import FRONTIER, LABELS, RATE, SEEDS, Cell, example, measured, model_directories

from _lib.command_line import prepare_process
from _lib.hugging_face import load
from _lib.real_tasks import TASKS
from _lib.retention import QUESTIONS, answers, prompt_of
from _lib.watched_runs import opened, train_one_step

PICTURE = DOCS / "frontier.png"
ARMS = ("student_mix", "teacher_alone", "default", "anchored_w4", "student_mix_other_hint")
ARMS_OF_TASK = {"one_sentence": ARMS, "canary": ("student_mix", "teacher_alone_forward")}
STEPS = (0, 5, 10, 20, 40)
NUM_TOKENS = 32
"""The length of the longest answer of the base, in tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or draw the picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ARMS_OF_TASK, default="one_sentence")
    parser.add_argument("--arms", nargs="+", choices=sorted(set().union(*ARMS_OF_TASK.values())), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--lines", type=Path, default=FRONTIER, help="(default: experiments/results/frontier.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/real_map"), help="the model and the runs")
    parser.add_argument("--picture", action="store_true", help="draw the picture and run nothing")
    options = parser.parse_args(argv)
    if options.picture:
        draw([line for line in read_lines(options.lines) if line["task"] == "one_sentence"])
    else:
        prepare_process(num_threads=None)
        for seed, arm in product(options.seeds, options.arms or ARMS_OF_TASK[options.task]):
            name = {"task": options.task, "arm": arm, "seed": seed}
            if not any(name.items() <= line.items() for line in read_lines(options.lines)):
                directory = options.directory / "-".join(["frontier", *map(str, name.values())])
                append_line(options.lines, name | run(**name, root=options.directory, directory=directory), directory)
    return 0


def run(task: str, arm: str, seed: int, root: Path, directory: Path) -> dict[str, Any]:
    """Train a cell, with the model under ``root``; return its settings and its figures at each of `STEPS`."""
    cell = Cell(TASKS[task], arm, RATE, seed, "held_out")
    hf, _ = model_directories(root)
    line: dict[str, Any] = {"lr": RATE, "steps": list(STEPS), "overrides": list(cell.chosen)}
    figures: list[dict[str, float]] = []
    with opened(cell.overrides(root, directory, STEPS[-1]), "train") as trainer:
        for step in range(STEPS[-1] + 1):
            if step in STEPS:
                found = measured(trainer, cell.task)
                if step:
                    trainer.save()
                    example.export(directory / "run", hf, directory / f"hf-{step}")
                drift = kl_to_base(directory / f"hf-{step}", hf) if step else 0.0
                shutil.rmtree(directory / f"hf-{step}", ignore_errors=True)
                figures.append(found | {"drift": round(drift, 6)})
            if step < STEPS[-1]:
                train_one_step(trainer)
    return line | {key: [at_step[key] for at_step in figures] for key in figures[0]}


@functools.cache
def answers_of_base(hf: Path) -> list[tuple[list[int], list[int]]]:
    """Return the prompt and the greedy answer of the base to each of `QUESTIONS`, as tokens."""
    tokenizer, model = load(hf)
    prompts = [prompt_of(tokenizer, question) for question in QUESTIONS]
    return list(zip(prompts, answers(model, prompts, tokenizer, NUM_TOKENS), strict=True))


def kl_to_base(model: Path, hf: Path) -> float:
    """Return KL(model || base) per token of the answers of the base, in nats: the mean over all these tokens."""
    import torch

    both = [load(place)[1] for place in (model, hf)]
    total, count = 0.0, 0
    for prompt, answer in answers_of_base(hf):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            rows = [torch.log_softmax(it(ids).logits[0, len(prompt) - 1 : -1].double(), -1) for it in both]
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
        count += len(answer)
    return total / count


def draw(lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the curve of each arm, the means over its seeds as a line and each seed as points.

    The curve shows the sampled answers of one short sentence over the drift.
    """
    from matplotlib.figure import Figure  # pyplot would need a display and keep state

    figure = Figure(figsize=(6.4, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    for arm, color in ((arm, f"C{number}") for number, arm in enumerate(ARMS)):
        runs = [line for line in lines if line["arm"] == arm]
        if not runs:
            continue
        across, up = (
            [mean(values) for values in zip(*(line[key] for line in runs), strict=True)] for key in ("drift", "sampled")
        )
        axis.plot(across, up, "o-", color=color, markersize=4, label=LABELS[arm])
        for run in runs:
            axis.plot(run["drift"], run["sampled"], "o", color=color, markersize=4, alpha=0.3, markeredgewidth=0)
        for place, step in enumerate(STEPS[1:], 1):
            at = across[place], up[place]
            axis.annotate(str(step), at, xytext=(3, 3), textcoords="offset points", fontsize=8, color=color)
    axis.set_xlabel("drift: KL(student || base) on general questions, nats per token")
    axis.set_ylabel("sampled answers of one short sentence")
    axis.set_ylim(-0.02, 1.02)
    finish(axis, "What is learnt, and how far the model drifts")
    axis.legend(fontsize=8, loc="center right")
    figure.savefig(PICTURE)


if __name__ == "__main__":
    sys.exit(main())
