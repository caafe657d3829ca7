# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the tables of docs/real_model.md: a real model, SmolLM2-135M-Instruct, on the tasks of _lib/real_tasks.py.

A cell is one task, one arm, one learning rate and one seed.  Its result is one line of results/real_map.jsonl.  A cell
whose line is there is not run again, so that the script may stop at any time and go on later.  The arm ``before`` is
the model itself, with and without hints.  Cells of the validation split choose a learning rate: they evaluate on the
problems of that split, and measure nothing else.

    python experiments/real_map.py --tasks one_sentence                      the missing cells of a task, every arm
    python experiments/real_map.py --tasks facts --arms default --seeds 11   a part of them
    python experiments/real_map.py --validate --rates 1e-5 2e-5 4e-5         the cells that choose a learning rate
    python experiments/real_map.py --tables                                  the tables and the picture from the lines
    python experiments/real_map.py --check                                   the status is 1 if the page has others

A step takes 5 to 30 seconds of two cores, or 2 to 6 of a GPU that nine runs share.  The tables stand between
<!-- table NAME --> and <!-- end NAME --> in the page: TASK has the figures of a task, brief those of three tasks in few
columns, hints has the base with and without hints, and losses compares targets over all tasks.

The task canary came last, when the rule and the default were decided.  Before its first run it had the arms default,
anchored_w4, anchored_forward_w2_guided, student_mix, teacher_alone and controls_with_share, with the steps and the rate
of one_sentence.  A target is good at it if it learns the sentence and not the source.  After the first cell
(student_mix, seed 11: .95 of the samples are one sentence, and none names the source) student_mix_forward and
teacher_alone_forward came in addition, because forward KL also raises tokens that the student hardly ever samples.

The task answer_first came last of all: the word problems, whose hints begin with the answer.  Before its first run it
had the arms default, anchored_w4, student_mix, teacher_alone and controls_with_share, with 10 steps and the rate of the
others.  The base learns no word problems in this time, so that only the leak is a result: the share of the samples
that begin with a number.  All hints have this form, so that controls should subtract it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from cell_lines import DOCS, FURTHER_TABLES, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import markdown, short, spread, write_or_compare
from real_pictures import draw_targets

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import write_records  # noqa: E402
from _lib.real_tasks import TASKS, RealTask  # noqa: E402
from _lib.retention import QUESTIONS, retention  # noqa: E402
from _lib.task import Record  # noqa: E402
from _lib.watched_runs import QUIET, WITHOUT_GUARDS, opened, train_one_step  # noqa: E402

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.trainer import Trainer

example = importlib.import_module("12_real_model")

FRONTIER = RESULTS / "frontier.jsonl"
LINES, PAGES = RESULTS / "real_map.jsonl", (DOCS / "real_model.md", FURTHER_TABLES / "real_tasks.md")
SEEDS, CHOICE_SEED = (11, 12, 13), 1
"""The seeds that are reported, and the seed of the cells that choose a learning rate."""
NUM_HELD_OUT, NUM_SAMPLES = 32, 2
RATE = 2e-5
LEAKY = ("canary", "answer_first")
"""The tasks that came after the rule, and whose leaks take nothing from the accuracy."""
STEPS = dict.fromkeys(("one_sentence", *LEAKY), 10) | {"facts": 30}
STEPS |= dict.fromkeys(("sort_words", "word_problems", "multiplication"), 20)
BEFORE = "before"
ANCHORED = ("target=capped", "target.anchor=reference")
WITH_STUDENT = ("target=capped", "target.anchor=student")
ALONE = ("target=teacher_alone",)
CONTROLS_WITH_SHARE = ("target=capped", "target.anchor=0.1", "target.control=other", "target.num_controls=2")
W2, W4 = "target.teacher_weight=2", "target.teacher_weight=4"
FORWARD, JSD = "loss.divergence=forward_kl", "loss.divergence=jsd"
GUIDED = ("rollout.guidance=mixed", "rollout.temperature=1")
GREEDILY_GUIDED = ("rollout.guidance=mixed", "rollout.temperature=0")
REPEATED = "{solution}\n\n{problem} Repeat the sentence above."
"""A wording after which the base is surer of a fact than after that of the task."""
REPEATING = f"data.teacher_template='{REPEATED}'"
WORDINGS = {
    "sort_words": "{problem} Answer with these words in this order: {solution}.",
    "word_problems": "{problem} Answer with this text: {solution}",
}
"""For the arms that end with ``worded``: of three wordings each, the one after which most of the base's greedy answers
to 48 training problems of seed 1 are right (.56 and .50; with those of the tasks .25 and .31)."""
REWARDED = ("data.global_batch_size=2", "rollout.num_samples=8", "rollout.temperature=1")
NO_HINT = "data.solutions=none"
ADAPTERS, ADAPTERS_RATE = "adapter.rank=16", 10
"""Adapters train at ten times the learning rate of a cell."""
ARMS: dict[str, tuple[str, ...]] = {
    BEFORE: (),
    "default": ANCHORED,
    "anchored_w2": (*ANCHORED, W2),
    "anchored_w4": (*ANCHORED, W4),
    "anchored_forward": (*ANCHORED, FORWARD),
    "anchored_jsd": (*ANCHORED, JSD),
    "anchored_guided": (*ANCHORED, *GUIDED),
    "anchored_forward_w2": (*ANCHORED, FORWARD, W2),
    "anchored_forward_w2_guided": (*ANCHORED, FORWARD, W2, *GUIDED),
    "anchored_forward_w2_greedily_guided_repeating": (*ANCHORED, FORWARD, W2, *GREEDILY_GUIDED, REPEATING),
    "student_mix": WITH_STUDENT,
    "student_mix_w2": (*WITH_STUDENT, W2),
    "student_mix_w4": (*WITH_STUDENT, W4),
    "student_mix_forward": (*WITH_STUDENT, FORWARD),
    "student_mix_jsd": (*WITH_STUDENT, JSD),
    "student_mix_guided": (*WITH_STUDENT, *GUIDED),
    "student_mix_lora": (*WITH_STUDENT, ADAPTERS),
    "controls_with_share": CONTROLS_WITH_SHARE,
    "default_worded": ANCHORED,
    "student_mix_worded": WITH_STUDENT,
    "controls_with_share_worded": CONTROLS_WITH_SHARE,
    "teacher_alone_worded": ALONE,
    "teacher_alone": ALONE,
    "teacher_alone_forward": (*ALONE, FORWARD),
    "teacher_alone_jsd": (*ALONE, JSD),
    "teacher_alone_forward_guided": (*ALONE, FORWARD, *GUIDED),
    "teacher_alone_forward_greedily_guided_twice": (*ALONE, FORWARD, *GREEDILY_GUIDED),
    "teacher_alone_forward_greedily_guided_repeating_twice": (*ALONE, FORWARD, *GREEDILY_GUIDED, REPEATING),
    "student_mix_other_hint": WITH_STUDENT,
    "default_other_hint": ANCHORED,
    "student_mix_no_hint": (*WITH_STUDENT, NO_HINT),
    "default_no_hint": (*ANCHORED, NO_HINT),
    "grpo": ("recipe=grpo", *REWARDED),
    "rft": ("recipe=rft", *REWARDED),
    "sft": ("method.name=sft",),
}
"""Name of an arm -> its overrides; ``other_hint`` at its end trains on other hints, ``twice`` for twice the steps,
``worded`` with the wording of `WORDINGS`."""
OTHER_INSTRUCTION = "Answer in plain English."


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
        return about | {"steps": self.num_steps}

    @property
    def num_steps(self) -> int:
        """The steps of the task, or twice as many for an arm that ends with ``twice``."""
        return STEPS[self.task.name] * (2 if self.arm.endswith("twice") else 1)

    def problems(self) -> list[Record]:
        """Return the problems of the training, with the hints that the arm gives."""
        records = self.task.problems("train", self.seed)
        return with_other_hints(records, self.seed) if self.arm.endswith("other_hint") else records

    @property
    def chosen(self) -> tuple[str, ...]:
        """The overrides of the arm, with the learning rate."""
        arm = ARMS[self.arm]
        worded = self.arm.endswith("worded")
        wording = (f"data.teacher_template='{WORDINGS[self.task.name]}'",) if worded else ()
        return (f"optimizer.lr={self.rate * (ADAPTERS_RATE if ADAPTERS in arm else 1):g}", *arm, *wording)

    def overrides(self, root: Path, directory: Path, num_steps: int) -> tuple[str, ...]:
        """Return the overrides of a run of ``num_steps`` in ``directory``, with the model under ``root``."""
        hf, megatron = model_directories(root)
        held_out = self.task.problems(self.split)[:NUM_HELD_OUT]
        return (
            *example.SETTINGS,
            *self.task.overrides,
            f"num_steps={num_steps}",
            f"evaluation.num_samples={NUM_SAMPLES}",
            *QUIET,
            *WITHOUT_GUARDS,
            *self.chosen,
            f"seed={self.seed}",
            f"data.path={write_records(directory / 'train.jsonl', self.problems())}",
            f"evaluation.path={write_records(directory / 'held_out.jsonl', held_out)}",
            f"data.tokenizer={hf}",
            f"checkpoint.load={megatron}",
            f"run_dir={directory / 'run'}",
        )

    def run(self, root: Path, directory: Path) -> dict[str, Any]:
        """Train and measure in ``directory``, with the model under ``root``; return the figures of the line."""
        figures: dict[str, Any] = {"overrides": list(self.chosen)}
        with opened(self.overrides(root, directory, self.num_steps), "train") as trainer:
            if self.arm == BEFORE:
                figures |= {f"hinted_{key}": value for key, value in measured(trainer, self.task, hinted=True).items()}
            else:
                figures |= trained(trainer)
            figures |= measured(trainer, self.task)
            if self.split == "held_out" and self.arm != BEFORE:
                trainer.save()
        if self.split != "held_out":
            return figures
        hf, _ = model_directories(root)
        model = hf if self.arm == BEFORE else example.export(directory / "run", hf, directory / "hf")
        return figures | kept(model, hf)


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
    parser.add_argument(
        "--tables", action="store_true", help="write the tables and the picture of the page, and run nothing"
    )
    parser.add_argument("--check", action="store_true", help="compare the tables of the page and run nothing")
    options = parser.parse_args(argv)
    prepare_process(num_threads=None)
    if options.tables or options.check:
        lines = read_lines(options.lines)
        if options.tables:
            reported = [line for line in lines if (line["task"], line["split"]) == ("one_sentence", "held_out")]
            draw_targets(reported, DRAWN, DOCS / "real_model.png")
        return write_or_compare(*PAGES, rows_of=lambda name: table_of(name, lines), compare=options.check)
    split = "validation" if options.validate else "held_out"
    seeds = options.seeds or ([CHOICE_SEED] if options.validate else SEEDS)
    for seed, task, arm, rate in product(seeds, options.tasks, options.arms, options.rates):
        cell = Cell(TASKS[task], arm, rate, seed, split)
        if not any(cell.name.items() <= line.items() for line in read_lines(options.lines)):
            run_cell(cell, options.lines, options.directory)
    return 0


def run_cell(cell: Cell, lines: Path, root: Path) -> None:
    """Run a cell, append its line, which names a GPU, and remove its run; the model stays for the other cells."""
    import torch

    began = time.perf_counter()
    directory = root / "-".join(map(str, cell.name.values()))
    line = cell.name | cell.run(root, directory)
    if torch.cuda.is_available():
        line["device"] = torch.cuda.get_device_name()
    line["seconds"] = round(time.perf_counter() - began, 1)
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
    """Train all steps; return the loss of every step, and the seconds of a step: the median from the second step on.

    A step of RFT in which no response is right has no loss: None.
    """
    losses: list[float | None] = []
    seconds = []
    for _ in range(trainer.config.num_steps):
        began = time.perf_counter()
        losses.append(train_one_step(trainer).get("loss/mean"))
        seconds.append(time.perf_counter() - began)
    return {
        "losses": [loss if loss is None else round(loss, 5) for loss in losses],
        "step_seconds": round(median(seconds[1:]), 2),
    }


def measured(trainer: Trainer, task: RealTask, hinted: bool = False) -> dict[str, Any]:
    """Return the figures of an evaluation on ``task``, with hints in the prompts if ``hinted``."""
    result = trainer.evaluate(hinted=hinted, num_transcripts=None)
    samples = [it for it in result.transcripts if it.sample is not None]
    figures = {
        "greedy": result.greedy_accuracy,
        "sampled": mean(it.correct for it in samples),
        "refers": mean(task.leak.search(it.response) is not None for it in samples),
        "tokens": mean(it.length for it in samples),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


@functools.cache
def kept(model: Path, hf: Path) -> dict[str, float]:
    """Return the figures of retention of ``model``; the base, which every task begins with, is measured once."""
    return {f"kept_{key}": round(value, 4) for key, value in asdict(retention(model, hf, QUESTIONS)).items()}


# -- the tables of the page -----------------------------------------------------------------------------------------

LABELS = {
    BEFORE: "before",
    "default": "anchored, w = .75, reverse KL",
    "anchored_w2": "anchored, w = 2, reverse KL",
    "anchored_w4": "anchored, w = 4, reverse KL",
    "anchored_forward": "anchored, w = .75, forward KL",
    "anchored_jsd": "anchored, w = .75, JSD",
    "anchored_guided": "anchored, w = .75, reverse KL, guided rollouts",
    "anchored_forward_w2": "anchored, w = 2, forward KL",
    "anchored_forward_w2_guided": "anchored, w = 2, forward KL, guided rollouts",
    "anchored_forward_w2_greedily_guided_repeating": (
        "anchored, w = 2, forward KL, greedy guided rollouts, the base repeats the hint"
    ),
    "student_mix": "mix with the student, w = .75, reverse KL",
    "student_mix_w2": "mix with the student, w = 2, reverse KL",
    "student_mix_w4": "mix with the student, w = 4, reverse KL",
    "student_mix_forward": "mix with the student, w = .75, forward KL",
    "student_mix_jsd": "mix with the student, w = .75, JSD",
    "student_mix_guided": "mix with the student, w = .75, reverse KL, guided rollouts",
    "student_mix_lora": "mix with the student, adapters of rank 16",
    "controls_with_share": "controls, K = 2, l = .1",
    "default_worded": "anchored, w = .75, reverse KL, the better wording",
    "student_mix_worded": "mix with the student, w = .75, reverse KL, the better wording",
    "controls_with_share_worded": "controls, K = 2, l = .1, the better wording",
    "teacher_alone_worded": "teacher alone, reverse KL, the better wording",
    "teacher_alone": "teacher alone, reverse KL",
    "teacher_alone_forward": "teacher alone, forward KL",
    "teacher_alone_jsd": "teacher alone, JSD",
    "teacher_alone_forward_guided": "teacher alone, forward KL, guided rollouts",
    "teacher_alone_forward_greedily_guided_twice": "teacher alone, forward KL, greedy guided rollouts, 60 steps",
    "teacher_alone_forward_greedily_guided_repeating_twice": (
        "teacher alone, forward KL, greedy guided rollouts, the base repeats the hint, 60 steps"
    ),
    "student_mix_other_hint": "ablation: mix with the student, another hint",
    "default_other_hint": "ablation: anchored, another hint",
    "student_mix_no_hint": "ablation: mix with the student, the wording without a hint",
    "default_no_hint": "ablation: anchored, the wording without a hint",
    "grpo": "GRPO with the verifier",
    "rft": "RFT with the verifier",
    "sft": "SFT on the hint",
}
NOT_SHOWN = (
    *("anchored_jsd", "anchored_guided", "student_mix_jsd", "student_mix_w2", "student_mix_w4"),
    *("student_mix_guided", "teacher_alone_jsd", "default_no_hint"),
)
"""The arms that the tables leave out, for their length; their lines are recorded as all others."""
DRAWN = {
    BEFORE: "before",
    "default": "the anchor is the\nfrozen reference",
    "student_mix_other_hint": "ablation: another instruction",
    "teacher_alone": "teacher alone",
    "student_mix": "the default: all hints are one\ntext, so the anchor is the student",
}
"""Arm -> its label in the picture."""
FIGURES = {
    "greedy": "greedy",
    "sampled": "sampled",
    "refers": "speak of the hint",
    "kept_perplexity": "perplexity",
    "kept_length": "general answers: tokens",
}
"""Figure of a line -> heading of its column."""
SHOWN = ("greedy", "sampled", "kept_perplexity", "kept_length")
"""The figures of the table of a task."""
SHOWN_OF_LEAKY = ("greedy", "sampled", "refers", "kept_length")
BRIEF = ("sort_words", "word_problems", "multiplication")
"""The tasks that share one table."""
SHOWN_OF_BRIEF = ("greedy", "sampled", "refers")
OF_FRONTIER = {"frontier": ("one_sentence", "drift"), "frontier_canary": ("canary", "refers")}
"""Table of the lines of frontier.py -> its task, and the figure beside the sampled accuracy."""


def table_of(name: str, lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table ``name`` of the page."""
    if name in OF_FRONTIER:
        task, figure = OF_FRONTIER[name]
        return table_of_frontier([line for line in read_lines(FRONTIER) if line["task"] == task], figure)
    reported = [line for line in lines if line["split"] == "held_out"]
    over_tasks = {"losses": table_of_losses, "hints": table_of_hints, "brief": table_of_brief_tasks}
    return over_tasks[name](reported) if name in over_tasks else table_of_task(name, reported)


def table_of_frontier(lines: Sequence[Line], figure: str) -> list[str]:
    """Return sampled accuracy / ``figure`` after the steps of frontier.py for each arm, over its seeds."""
    steps = lines[0]["steps"][1:]
    rows = [
        [f"sampled / {FIGURES.get(figure, figure)} after", "seeds", *(f"{step} steps" for step in steps)],
        ["---"] * (len(steps) + 2),
    ]
    for arm in (arm for arm in LABELS if any(line["arm"] == arm for line in lines)):
        runs = [line for line in lines if line["arm"] == arm]
        at_steps = [zip(*(run[key][1:] for run in runs), strict=True) for key in ("sampled", figure)]
        cells = [" / ".join(map(spread, both)) for both in zip(*at_steps, strict=True)]
        rows.append([LABELS[arm], " ".join(str(run["seed"]) for run in runs), *cells])
    return markdown(rows)


def table_of_hints(lines: Sequence[Line]) -> list[str]:
    """Return greedy / sampled accuracy of the base without and with the hint, and what the rule takes, per task."""
    rows = [["task", "without the hint", "with the hint", "speak of the hint", "the rule takes"], ["---"] * 5]
    for line in (line for task in TASKS for line in lines if (line["task"], line["arm"]) == (task, BEFORE)):
        hinted = accuracies({"greedy": line["hinted_greedy"], "sampled": line["hinted_sampled"]})
        chosen = LABELS[chosen_on_real(line["task"], lines)]
        rows.append([f"`{line['task']}`", accuracies(line), hinted, short(line["hinted_refers"]), chosen])
    return markdown(rows)


def table_of_task(task: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of a task, a row for each arm that has a line, with the number of its seeds."""
    figures = SHOWN_OF_LEAKY if task in LEAKY else SHOWN
    rows = [["", "seeds", *(FIGURES[figure] for figure in figures)], ["---"] * (len(figures) + 2)]
    rows += rows_of_task(task, figures, lines)
    return markdown(rows)


def table_of_brief_tasks(lines: Sequence[Line]) -> list[str]:
    """Return one table of the tasks in `BRIEF`, with a row for each task and arm but the base, which `hints` has."""
    rows = [["task", "", "seeds", *(FIGURES[figure] for figure in SHOWN_OF_BRIEF)], ["---"] * (len(SHOWN_OF_BRIEF) + 3)]
    trained = [line for line in lines if line["arm"] != BEFORE]
    rows += [[f"`{task}`", *row] for task in BRIEF for row in rows_of_task(task, SHOWN_OF_BRIEF, trained)]
    return markdown(rows)


def rows_of_task(task: str, figures: Sequence[str], lines: Sequence[Line]) -> list[list[str]]:
    """Return the cells of a task: the label of each arm that has a line, the number of its seeds, and the figures."""
    rows = []
    for arm, label in LABELS.items():
        of_arm = [line for line in lines if (line["task"], line["arm"]) == (task, arm)]
        if of_arm and arm not in NOT_SHOWN:
            label = f"{label} (the default)" if arm == default_on(task) else label
            rows.append([label, str(len(of_arm)), *(spread([line[figure] for line in of_arm]) for figure in figures)])
        if of_arm and arm == BEFORE:
            cells = [spread([line.get(f"hinted_{figure}") for line in of_arm]) for figure in figures]
            rows.append(["before, with the hint in the prompt", str(len(of_arm)), *cells])
    return rows


SMALL_TASKS = (
    *("leak", "quickstart", "wrong_hints", "hard", "many_answers", "chat_logs"),
    *("unsolved", "unsolved_leaking", "unsolved_wrong", "choosing", "choosing_surer"),
)
"""The tasks of anchored_map.py that compare the three fixed targets under reverse KL."""
FIXED = {
    "default": "anchored_matched",
    "student_mix": "student_matched",
    "teacher_alone": "teacher_alone",
    "anchored_forward_w2_guided": "anchored_matched_forward_w2_guided",
}
"""Arm of a real task -> the same arm of a small task; the last one is no fixed target, but a choice of the rule."""
BY_OVERRIDES = {(): "default", ("target.anchor=student",): "student_mix"}
"""What `recommended` returns -> the arm; its third choice has guided rollouts."""


def table_of_losses(lines: Sequence[Line]) -> list[str]:
    """Return the sampled accuracy of the best fixed target and the losses of targets, default and rule, per task.

    The default takes its anchor by the data: the student where all hints are one text.  `LEAKY` is left out.
    """
    small = read_lines(RESULTS / "anchored_map.jsonl")
    fixed = list(FIXED)[:3]
    headings = ("anchored", "mix with the student", "teacher alone", "the default", "by the rule", "the rule takes")
    rows = [["task", "best", *headings], ["---"] * (2 + len(headings))]
    losses: list[list[float]] = []
    for task in (*SMALL_TASKS, *(task for task in TASKS if task not in LEAKY)):
        scores = scores_on_small(task, small) if task in SMALL_TASKS else scores_on_real(task, lines)
        chosen = chosen_on_small(task, small) if task in SMALL_TASKS else chosen_on_real(task, lines)
        if not {*fixed, chosen} <= scores.keys():
            continue
        best, default = max(scores[arm] for arm in fixed), "default" if task in SMALL_TASKS else default_on(task)
        losses.append([best - scores[arm] for arm in (*fixed, default, chosen)])
        rows.append([task, short(best), *map(signed, losses[-1]), chosen])
    for name, of in (("mean", mean), ("worst", max)):
        rows.append([name, "", *(signed(of(column)) for column in zip(*losses, strict=True)), ""])
    return markdown(rows)


def scores_on_small(task: str, lines: Sequence[Line]) -> dict[str, float]:
    """Return the sampled accuracy after the last step of each arm of `FIXED`, the mean over the seeds."""
    scores: dict[str, float] = {}
    for arm, name in FIXED.items():
        place = f"{task}_guided" if name.endswith("guided") else task
        of_arm = [line["sampled"][-1] for line in lines if (line["experiment"], line["arm"]) == (place, name)]
        scores |= {arm: mean(of_arm)} if of_arm else {}
    return scores


def scores_on_real(task: str, lines: Sequence[Line]) -> dict[str, float]:
    """Return the sampled accuracy of each arm of `FIXED`, the mean over the seeds."""
    of_arm = {arm: [line["sampled"] for line in lines if (line["task"], line["arm"]) == (task, arm)] for arm in FIXED}
    return {arm: mean(scores) for arm, scores in of_arm.items() if scores}


def chosen_on_small(task: str, lines: Sequence[Line]) -> str:
    """Return the arm that the rule chooses; every problem of a small task has a hint of its own."""
    bases = [line for line in lines if (line["experiment"], line["arm"]) == (task, "base")]
    hinted = [line["hinted"]["within_3"] if isinstance(line["hinted"], dict) else line["hinted"] for line in bases]
    return chosen_arm(mean(line["sampled"][0] for line in bases), mean(hinted), num_hints=2)


def default_on(task: str) -> str:
    """Return the arm that is the default on a real task: its anchor is the student where all hints are one text."""
    hints = {record["solution"] for record in TASKS[task].problems("train")}
    return "student_mix" if len(hints) == 1 else "default"


def chosen_on_real(task: str, lines: Sequence[Line]) -> str:
    """Return the arm that the rule chooses; empty before the base is measured."""
    before = [line for line in lines if (line["task"], line["arm"]) == (task, BEFORE)]
    num_hints = len({record["solution"] for record in TASKS[task].problems("held_out")[:NUM_HELD_OUT]})
    return chosen_arm(before[0]["sampled"], before[0]["hinted_sampled"], num_hints) if before else ""


def chosen_arm(accuracy: float, hinted_accuracy: float, num_hints: int) -> str:
    """Return the arm with the settings that `selfdistill evaluate --hinted` recommends."""
    from megatron_selfdistill.instruments.evaluate.first_step import recommended

    overrides = recommended(num_hints, NUM_HELD_OUT, accuracy, hinted_accuracy).overrides
    return BY_OVERRIDES.get(overrides, "anchored_forward_w2_guided")


def signed(value: float) -> str:
    """Return a loss with its sign, if it is a gain, without the zero before the point."""
    return f"-{short(-value)}" if round(value, 2) < 0 else short(max(value, 0.0))


def accuracies(line: Line) -> str:
    """Return greedy / sampled accuracy."""
    return f"{short(line['greedy'])} / {short(line['sampled'])}"


if __name__ == "__main__":
    sys.exit(main())
