# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command `selfdistill alignment`: whether the losses push the student towards tokens with which it succeeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.commands.alignment_contexts import check_contexts, hinted_problems
from megatron_selfdistill.commands.alignment_options import alignment_arguments
from megatron_selfdistill.commands.endings import ended
from megatron_selfdistill.config.world_checks import check_world

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.evaluation.alignment_groups import MeasuredNode
    from megatron_selfdistill.run_data import RunData

RESERVED = {
    "data.path": "--data",
    "evaluation.path": "--data",
    "evaluation.limit": "--limit",
    "checkpoint.load": "the argument CHECKPOINT",
    "run_dir": "--out",
}
"""The keys that options set -> the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status.

    0 is success; `ended` has the others, each of which follows a message.
    """
    arguments = alignment_arguments(list(sys.argv[1:] if argv is None else argv))

    def work() -> int:
        check(arguments)
        return align(arguments)

    return ended("alignment", work)


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` or `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill.commands.given_models import check_reading

    config, _ = _loaded(arguments)
    check_contexts(arguments.teacher_context)
    check_reading(arguments, config)


def align(arguments: argparse.Namespace) -> int:
    """Measure the alignment, on every rank, and return the exit status; rank 0 writes and prints."""
    from megatron_selfdistill.commands.alignment_job import AlignmentJob
    from megatron_selfdistill.commands.given_model import computed_in, configured, temporary_directory
    from megatron_selfdistill.commands.given_models import GivenModels
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
    from megatron_selfdistill.run_data import RunData

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that temporary directories are removed
    given, keys = _loaded(arguments)
    models = GivenModels.of(arguments, given)
    model = models.found_student()
    config = configured(given, keys, model)
    check_world(config, world_size())
    run_data = RunData.load_evaluation(config, with_solutions=True)
    check_answers(run_data.evaluation, load_verifier(config.evaluation.verifier))
    numbers = {"num_nodes": arguments.nodes, "num_top": arguments.top, "num_completions": arguments.completions}
    hints = hinted_problems(arguments.teacher_context, run_data.evaluation)
    job = AlignmentJob.of_problems(config, run_data, hints, **numbers)
    about_types = computed_in(config, model)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with temporary_directory(arguments.tmp or arguments.out.parent, grid) as directory, ExitStack() as stack:
            placed = models.placed(model, directory, stack)
            checkpoint = dataclasses.replace(config.checkpoint, load=placed.student)
            placed_config = dataclasses.replace(config, checkpoint=checkpoint, run_dir=str(directory / "run"))
            measured = dataclasses.replace(job, config=placed_config).measured(grid, placed.teacher, placed.reference)
        if grid.is_reporter:
            print(models.about(), about_types, sep="\n", flush=True)
            _write(arguments, measured, run_data, {"model": model, "settings": {**_settings(config), **numbers}})
    finally:
        ranks.shutdown()
    return 0


def _write(
    arguments: argparse.Namespace, measured: Sequence[MeasuredNode], run_data: RunData, about: dict[str, Any]
) -> None:
    """Write the results as JSON and print the table."""
    from megatron_selfdistill.evaluation.alignment_groups import node_groups
    from megatron_selfdistill.evaluation.evaluations import data_fingerprint
    from megatron_selfdistill.evaluation.tables import show_alignment

    problems = run_data.evaluation
    data = {"path": str(arguments.data), "fingerprint": data_fingerprint(problems), "num_problems": len(problems)}
    groups = node_groups(measured)
    record = {
        **about,
        "data": data,
        "groups": [dataclasses.asdict(group) for group in groups],
        "nodes": [it.record(run_data.tokenizer) for it in measured],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show_alignment(groups, len(problems), f"written to {arguments.out}")


def _loaded(arguments: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    from megatron_selfdistill.commands.given_models import config_before_the_model

    return config_before_the_model(arguments, RESERVED, {"path": str(arguments.data), "limit": arguments.limit})


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings on which the numbers depend besides the models and the problems."""
    from megatron_selfdistill.config import writable

    values, rollout = writable(config), config.rollout
    names = "system_prompt student_template teacher_template chat_template chat_template_kwargs fields".split()
    return {
        "seed": config.seed,
        "verifier": config.evaluation.verifier,
        "confidence": config.evaluation.confidence,
        "target": values["target"],
        "jsd_lambda": config.loss.jsd_lambda,
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_k": rollout.top_k,
        "top_p": rollout.top_p,
        **{name: values["data"][name] for name in names},
    }
