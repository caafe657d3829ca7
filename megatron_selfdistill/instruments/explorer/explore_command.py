# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command `selfdistill explore`: the page of the target of every token of one response."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill.commands.model_command import ended, parsed
from megatron_selfdistill.config.world_checks import check_world
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.explorer.given_models import ModelPlaces, add_models, config_of_reading

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.data.problems import Problem

DESCRIPTION = """Write a page that shows the target of every token of a response.

    selfdistill explore /models/Qwen3-8B --problem "What is 12 * 12?" --solution "12 * 12 = 144" -o target.html
    selfdistill explore runs/first --problem p.txt --solution s.txt --response r.txt
    selfdistill explore runs/first --problem p.txt --solution s.txt target.control=other --data problems.jsonl

A run directory stands for its latest checkpoint, with the prompts, the target and the sampling of the run, and with the
checkpoint that the run has started from as a frozen teacher and as the reference.  Without --response the model
generates one.

The page needs nothing but a browser.  It colours each token by its divergence between student and target, shows the
candidates of student, teacher and target, and computes the target again for another teacher's weight, rule, anchor or
divergence.

key=value changes any key of the trainer: target.teacher_weight=2, target=strict, data.teacher_template=...,
rollout.temperature=0, parallel.tensor_model_parallel_size=2.  On several ranks:

    torchrun --nproc-per-node 2 -m megatron_selfdistill explore /models/Qwen3-8B --problem p.txt --solution s.txt \\
        parallel.tensor_model_parallel_size=2
"""
"""The text of --help."""

RESERVED = {
    "data.path": "--problem and --solution",
    "evaluation.path": "--data",
    "checkpoint.load": "the argument CHECKPOINT",
    "run_dir": "--out",
}
"""The keys that options set -> the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status.

    0 is success; `ended` has the others, each of which follows a message.
    """
    arguments = exploration_arguments(list(sys.argv[1:] if argv is None else argv))

    return ended("explore", lambda: explore(arguments))


def explore(arguments: argparse.Namespace) -> int:
    """Write the page, on every rank, and return the exit status; rank 0 writes and prints."""
    given, keys = config_of_reading(arguments, RESERVED, {"path": arguments.data})
    if given.target.control == "other" and arguments.data is None:
        raise ConfigError(
            "target.control=other compares with the hints of other problems: name a file of problems with --data, or "
            "set target.control=none"
        )
    from megatron_selfdistill.commands.given_model import computed_in, configured, temporary_directory
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.instruments.explorer.exploration import Exploration

    models = ModelPlaces.of(arguments, given)
    model = models.found_student()
    config = configured(given, keys, model)
    check_world(config, world_size())
    response = None if arguments.response is None else given_text(arguments.response)
    exploration = Exploration.of_problem(config, _problem(arguments), response)
    about_types = computed_in(config, model)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with temporary_directory(arguments.tmp or arguments.out.parent, grid) as directory, ExitStack() as stack:
            placed = models.placed(model, directory, stack)
            about = {"model": str(models.student), "teacher": str(models.teacher or models.student)}
            summary = exploration.write_page(arguments.out, placed, directory / "run", grid, about)
    finally:
        ranks.shutdown()
    if summary is not None:
        print(models.about(), about_types, summary, sep="\n", flush=True)
    return 0


def _problem(arguments: argparse.Namespace) -> Problem:
    from megatron_selfdistill.data.problems import Problem

    text, solution = (given_text(getattr(arguments, name)) for name in ("problem", "solution"))
    return Problem("given", ({"role": "user", "content": text},), solution, None, "--problem")


def exploration_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of `selfdistill explore`; ends the process with status 2 for options that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="selfdistill explore", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models(parser)
    text = "a text, or the name of a file with the text"
    parser.add_argument("--problem", required=True, metavar="TEXT", help=text)
    parser.add_argument("--solution", required=True, metavar="TEXT", help=f"what only the teacher sees: {text}")
    parser.add_argument("--response", metavar="TEXT", help=f"the response (default: the model generates one): {text}")
    parser.add_argument("--data", metavar="FILE", help="problems with the other hints of target.control=other")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("target.html"), metavar="FILE", help="the page (default: target.html)"
    )
    return parsed(parser, argv)


def given_text(value: str) -> str:
    """Return the contents of the file that ``value`` names, else ``value`` itself.  Raises: `ConfigError`, OSError."""
    text = Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value
    if not text.strip():
        raise ConfigError("--problem, --solution and --response: expected a text, got only white space")
    return text
