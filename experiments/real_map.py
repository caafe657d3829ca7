# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the tables of docs/real_model.md: a real model, SmolLM2-135M-Instruct, on the tasks of _lib/real_tasks.py.

A cell is one task, one arm, one learning rate and one seed.  Its result is one line of results/real_map.jsonl.  A cell
whose line is there is not run again, so that the script may stop at any time and go on later.  The arm ``before`` is
the model itself, with and without hints.  Cells of the validation split choose a learning rate: they evaluate on the
problems of that split, and measure nothing else.

    python experiments/real_map.py --tasks one_sentence                      the missing cells of a task, every arm
    python experiments/real_map.py --tasks facts --arms default --seeds 11   a part of them
    python experiments/real_map.py --validate --rates 1e-5 2e-5 4e-5         the cells that choose a learning rate

A step takes 5 to 30 seconds of two cores.
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from cell_lines import REPOSITORY, RESULTS, append_line, read_lines

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import write_records  # noqa: E402
from _lib.real_tasks import TASKS, WITH_SOLUTION, RealTask  # noqa: E402
from _lib.retention import QUESTIONS, retention  # noqa: E402
from _lib.task import Record  # noqa: E402
from _lib.watched_runs import QUIET, WITHOUT_GUARDS, opened, train_one_step  # noqa: E402

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.trainer import Trainer

example = importlib.import_module("12_real_model")

LINES = RESULTS / "real_map.jsonl"
SEEDS, CHOICE_SEED = (11, 12, 13), 1
"""The seeds that are reported, and the seed of the cells that choose a learning rate."""
NUM_HELD_OUT, NUM_SAMPLES = 32, 2
RATE = 2e-5
STEPS = {"one_sentence": 10, "facts": 30, "sort_words": 20, "word_problems": 20, "multiplication": 20}
BEFORE = "before"
ANCHORED = ("target=capped", "target.anchor=reference")
WITH_STUDENT = ("target=capped", "target.anchor=student")
ALONE = ("target=teacher_alone",)
FORWARD, GUIDED = "loss.divergence=forward_kl", "rollout.guidance=mixed"
REWARDED = ("data.global_batch_size=2", "rollout.num_samples=8", "rollout.temperature=1")
ARMS: dict[str, tuple[str, ...]] = {
    BEFORE: (),
    "default": ANCHORED,
    "anchored_w2": (*ANCHORED, "target.teacher_weight=2"),
    "anchored_w4": (*ANCHORED, "target.teacher_weight=4"),
    "anchored_forward_w2": (*ANCHORED, FORWARD, "target.teacher_weight=2"),
    "anchored_forward_w2_guided": (*ANCHORED, FORWARD, "target.teacher_weight=2", GUIDED),
    "student_mix": WITH_STUDENT,
    "student_mix_forward": (*WITH_STUDENT, FORWARD),
    "student_mix_jsd": (*WITH_STUDENT, "loss.divergence=jsd"),
    "student_mix_lora": (*WITH_STUDENT, "adapter.rank=16", "optimizer.lr=2e-4"),
    "teacher_alone": ALONE,
    "teacher_alone_forward": (*ALONE, FORWARD),
    "student_mix_other_hint": WITH_STUDENT,
    "default_other_hint": ANCHORED,
    "student_mix_no_hint": WITH_STUDENT,
    "default_no_hint": ANCHORED,
    "grpo": ("recipe=grpo", *REWARDED),
    "rft": ("recipe=rft", *REWARDED),
    "sft": ("method.name=sft",),
}
"""Name of an arm -> its overrides; one that ends with ``other_hint`` or ``no_hint`` trains on other hints."""
NO_HINT = "none"
OTHER_INSTRUCTION = "Answer in plain English."
REFERS = re.compile(r"\b(?:reference|(?:the|this|given|provided) (?:solution|hint|answer is given))\b", re.IGNORECASE)
"""A response that speaks of the hint as something that it has read."""


@dataclass(frozen=True)
class Cell:
    """One run: a task, an arm, a learning rate and a seed, on the held-out problems or on those of validation."""

    task: RealTask
    arm: str
    rate: float
    seed: int
    split: str

    @property
    def name(self) -> dict[str, Any]:
        """The entries of the line by which a cell is found."""
        about = {"task": self.task.name, "arm": self.arm, "seed": self.seed, "lr": self.rate, "split": self.split}
        return about | {"steps": STEPS[self.task.name]}

    def problems(self) -> list[Record]:
        """Return the problems of the training, with the hints that the arm gives."""
        records = self.task.problems("train", self.seed)
        return with_other_hints(records, self.seed) if self.arm.endswith("other_hint") else records

    @property
    def wording(self) -> tuple[str, ...]:
        """The override of an arm whose teacher reads the wording of a hint without the hint."""
        if not self.arm.endswith("no_hint"):
            return ()
        return (f"data.teacher_template='{WITH_SOLUTION.replace('{solution}', NO_HINT)}'",)

    def run(self, root: Path, directory: Path) -> dict[str, Any]:
        """Train and measure in ``directory``, with the model under ``root``; return the figures of the line."""
        hf, megatron = model_directories(root)
        held_out = self.task.problems(self.split)[:NUM_HELD_OUT]
        chosen = (f"optimizer.lr={self.rate:g}", *ARMS[self.arm], *self.wording)
        overrides = (
            *example.SETTINGS,
            *self.task.overrides,
            f"num_steps={STEPS[self.task.name]}",
            f"evaluation.num_samples={NUM_SAMPLES}",
            *QUIET,
            *WITHOUT_GUARDS,
            *chosen,
            f"seed={self.seed}",
            f"data.path={write_records(directory / 'train.jsonl', self.problems())}",
            f"evaluation.path={write_records(directory / 'held_out.jsonl', held_out)}",
            f"data.tokenizer={hf}",
            f"checkpoint.load={megatron}",
            f"run_dir={directory / 'run'}",
        )
        figures: dict[str, Any] = {"overrides": list(chosen)}
        with opened(overrides, "train") as trainer:
            if self.arm == BEFORE:
                figures |= {f"hinted_{key}": value for key, value in measured(trainer, hinted=True).items()}
            else:
                figures |= trained(trainer)
            figures |= measured(trainer)
            if self.split == "held_out" and self.arm != BEFORE:
                trainer.save()
        if self.split != "held_out":
            return figures
        model = hf if self.arm == BEFORE else example.export(directory / "run", hf, directory / "hf")
        return figures | {
            f"kept_{key}": round(value, 4) for key, value in asdict(retention(model, hf, QUESTIONS)).items()
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 11 12 13; with --validate 1)")
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help=f"learning rates (default: {RATE:g})")
    parser.add_argument("--validate", action="store_true", help="evaluate on the validation split, and nothing else")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/real_map.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/real_map"), help="the model and the runs")
    options = parser.parse_args(argv)
    split = "validation" if options.validate else "held_out"
    seeds = options.seeds or ([CHOICE_SEED] if options.validate else SEEDS)
    prepare_process(num_threads=None)
    for seed, task, arm, rate in product(seeds, options.tasks, options.arms, options.rates):
        cell = Cell(TASKS[task], arm, rate, seed, split)
        if not any(cell.name.items() <= line.items() for line in read_lines(options.lines)):
            run_cell(cell, options.lines, options.directory)
    return 0


def run_cell(cell: Cell, lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the model stays for the other cells."""
    began = time.perf_counter()
    directory = root / "-".join(map(str, cell.name.values()))
    line = cell.name | cell.run(root, directory) | {"seconds": round(time.perf_counter() - began, 1)}
    append_line(lines, line, directory)


def model_directories(root: Path) -> tuple[Path, Path]:
    """Return the Hugging Face directory and the Megatron checkpoint of the model, made under ``root`` once."""
    from megatron_selfdistill.interop import conversion

    hf, megatron = root / "hf", root / "megatron"
    example.make_hugging_face(hf)
    if not megatron.exists():
        conversion.hf_to_megatron(hf, megatron)
    return hf, megatron


def with_other_hints(records: Sequence[Record], seed: int) -> list[Record]:
    """Return the problems, each with the hint of another one; where all have one instruction, with another one."""
    hints = [record["solution"] for record in records]
    if len(set(hints)) == 1:
        return [record | {"solution": OTHER_INSTRUCTION} for record in records]
    order = list(range(len(hints)))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [record | {"solution": hints[following[at]]} for at, record in enumerate(records)]


def trained(trainer: Trainer) -> dict[str, Any]:
    """Train all steps; return the loss of every step, and the seconds of a step: the median from the second step on."""
    losses, seconds = [], []
    for _ in range(trainer.config.num_steps):
        began = time.perf_counter()
        losses.append(train_one_step(trainer)["loss"])
        seconds.append(time.perf_counter() - began)
    return {"losses": [round(loss, 5) for loss in losses], "step_seconds": round(median(seconds[1:]), 2)}


def measured(trainer: Trainer, hinted: bool = False) -> dict[str, Any]:
    """Return the figures of an evaluation, with hints in the prompts if ``hinted``."""
    result = trainer.evaluate(hinted=hinted, num_transcripts=None)
    samples = [it for it in result.transcripts if it.sample is not None]
    figures = {
        "greedy": result.greedy_accuracy,
        "sampled": mean(it.correct for it in samples),
        "refers": mean(REFERS.search(it.response) is not None for it in samples),
        "tokens": mean(it.length for it in samples),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
