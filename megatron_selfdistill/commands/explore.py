# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command `selfdistill explore`: the page of the target of every token of one response."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_selfdistill.commands.endings import ended
from megatron_selfdistill.commands.explore_options import exploration_arguments, given_text
from megatron_selfdistill.config.world_checks import check_world

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.problems import Problem

RESERVED = {
    "data.path": "--problem and --solution",
    "evaluation.path": "--problem and --solution",
    "checkpoint.load": "the argument CHECKPOINT",
    "run_dir": "--out",
}
"""The keys that options set -> the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status.

    0 is success; `ended` has the others, each of which follows a message.
    """
    arguments = exploration_arguments(list(sys.argv[1:] if argv is None else argv))

    def work() -> int:
        check(arguments)
        return explore(arguments)

    return ended("explore", work)


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` or `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill.commands.given_models import check_reading

    for option in ("problem", "solution", "response"):
        if getattr(arguments, option) is not None:
            given_text(f"--{option}", getattr(arguments, option))
    config, _ = _loaded(arguments)
    check_reading(arguments, config)


def explore(arguments: argparse.Namespace) -> int:
    """Write the page, on every rank, and return the exit status; rank 0 writes and prints."""
    from megatron_selfdistill.commands.exploration import Exploration
    from megatron_selfdistill.commands.given_model import computed_in, configured, temporary_directory
    from megatron_selfdistill.commands.given_models import GivenModels
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that temporary directories are removed
    given, keys = _loaded(arguments)
    models = GivenModels.of(arguments, given)
    model = models.found_student()
    config = configured(given, keys, model)
    check_world(config, world_size())
    response = None if arguments.response is None else given_text("--response", arguments.response)
    exploration = Exploration.of_problem(config, _problem(arguments), response)
    about_types = computed_in(config, model)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with temporary_directory(arguments.tmp or arguments.out.parent, grid) as directory, ExitStack() as stack:
            placed = models.placed(model, directory, stack)
            exploration = exploration.with_models(**placed._asdict(), run_dir=str(directory / "run"))
            about = {"model": str(models.student), "teacher": str(models.teacher or models.student)}
            summary = exploration.write_page(arguments.out, grid, about)
    finally:
        ranks.shutdown()
    if summary is not None:
        print(models.about(), about_types, summary, sep="\n", flush=True)
    return 0


def _loaded(arguments: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    from megatron_selfdistill.commands.given_models import config_before_the_model

    return config_before_the_model(arguments, RESERVED, {"path": None})


def _problem(arguments: argparse.Namespace) -> Problem:
    from megatron_selfdistill.data.problems import Problem

    text, solution = (given_text(f"--{name}", getattr(arguments, name)) for name in ("problem", "solution"))
    return Problem("given", ({"role": "user", "content": text},), solution, None, "--problem")
