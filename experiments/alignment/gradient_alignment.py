# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure whether the losses push the student towards tokens with which it succeeds: a metric of arXiv 2605.10889."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.choices import HINT_LEVELS
from megatron_selfdistill.commands.model_command import ended, parsed
from megatron_selfdistill.config.command_line import at_least_1
from megatron_selfdistill.config.world_checks import check_world
from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.explorer.given_models import add_models

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from alignment_nodes import MeasuredNode

    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.problems import Problem
    from megatron_selfdistill.data.run_data import RunData

DESCRIPTION = """Measure whether distillation pushes a model towards tokens with which it succeeds.

    python experiments/alignment/gradient_alignment.py /models/Qwen3-8B --data problems.jsonl -o alignment.json
    python experiments/alignment/gradient_alignment.py runs/first --data problems.jsonl --limit 4 --nodes 8

The model responds to each problem.  At some tokens of the response, the nodes, the likely tokens of student, teacher
and target are tried: the model completes the response after each of them, and a verifier judges the completions.  This
gives the direction in which the logits of the node make success more likely.  The alignment of a loss is the cosine
between this direction and the step that the loss takes, averaged over nodes: 1 is the best direction, 0 is no help, and
below 0 the loss makes success less likely.

Problems need solutions for the teacher and answers for the verifier.  A run directory stands for its latest checkpoint,
with the prompts, the target and the sampling of the run.  The work is nodes x candidates x completions samples for each
problem: at most 16 x 12 x 8 with the defaults.

With several --teacher-context, the same responses are read with each of the hints, and each hint has its own table:
--teacher-context solution --teacher-context answer

key=value changes any key of the trainer: target.teacher_weight=2, data.teacher_template=..., rollout.engine=vllm,
parallel.tensor_model_parallel_size=2.  On several ranks:

    torchrun --nproc-per-node 2 experiments/alignment/gradient_alignment.py /models/Qwen3-8B --data problems.jsonl
"""
"""The text of --help."""

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
        return align(arguments, *checked(arguments))

    return ended("gradient_alignment", work)


def checked(arguments: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """Return the configuration before the model is known, and the keys that the user has set.

    Raises: `ConfigError` or `CheckpointError` for every mistake that can be found without importing torch.
    """
    from megatron_selfdistill.instruments.explorer.given_models import config_of_reading

    check_contexts(arguments.teacher_context)
    return config_of_reading(arguments, RESERVED, {"path": str(arguments.data), "limit": arguments.limit})


def align(arguments: argparse.Namespace, given: Config, keys: frozenset[str]) -> int:
    """Measure the alignment, on every rank, and return the exit status; rank 0 writes and prints.

    ``given``, ``keys``: the result of `checked`.
    """
    from alignment_job import AlignmentJob

    from megatron_selfdistill.commands.given_model import computed_in, configured, temporary_directory
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
    from megatron_selfdistill.instruments.explorer.given_models import ModelPlaces

    models = ModelPlaces.of(arguments, given)
    model = models.found_student()
    config = configured(given, keys, model)
    check_world(config, world_size())
    run_data = RunData.load_evaluation(config, with_solutions=True)
    check_answers(run_data.evaluation, load_verifier(config.evaluation.verifier))
    numbers = {"num_nodes": arguments.nodes, "num_top": arguments.top, "num_completions": arguments.completions}
    hints = hinted_problems(arguments.teacher_context, run_data.evaluation, config.seed)
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
    from alignment_nodes import node_groups, show_alignment

    from megatron_selfdistill.evaluation.evaluations import data_fingerprint

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


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings on which the numbers depend besides the models and the problems."""
    values, rollout = dataclasses.asdict(config), config.rollout
    names = "system_prompt views student_template teacher_template chat_template chat_template_kwargs fields".split()
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


def alignment_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the process with status 2 for options that cannot be used."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="problems with solutions and answers, in any form of data.path"
    )
    parser.add_argument(
        "--limit", type=at_least_1, default=8, metavar="N", help="number of first problems (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-context",
        action="append",
        metavar="HINT",
        help="what the teacher sees: solution, answer, or a file of `selfdistill solutions`; several times for several "
        "contexts (default: solution)",
    )
    parser.add_argument(
        "--nodes", type=at_least_1, default=16, metavar="N", help="nodes of a response (default: %(default)s)"
    )
    parser.add_argument(
        "--top",
        type=at_least_1,
        default=4,
        metavar="N",
        help="most likely tokens of each of student, teacher and target that are tried (default: %(default)s)",
    )
    parser.add_argument(
        "--completions", type=at_least_1, default=8, metavar="N", help="completions per token (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("alignment.json"),
        metavar="FILE",
        help="the results as JSON (default: alignment.json)",
    )
    arguments = parsed(parser, argv)
    arguments.teacher_context = arguments.teacher_context or ["solution"]
    return arguments


def check_contexts(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a context that is named twice, or that is neither of `HINT_LEVELS` nor a file."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f"--teacher-context {name}: expected different contexts, got this one twice")
        if name not in HINT_LEVELS and not Path(name).is_file():
            raise ConfigError(
                f"--teacher-context {name}: expected {', '.join(HINT_LEVELS)} or a file that `selfdistill solutions` "
                "has written, got no such file"
            )


def hinted_problems(names: Sequence[str], problems: Sequence[Problem], seed: int) -> dict[str, list[Problem]]:
    """Return the context -> ``problems`` with the hint of the context as the solution; ``seed`` draws the others.

    A file has one JSON object per line, with ``problem_id`` and ``solution``; the first line of a problem counts.
    Raises: `ConfigError` for a problem without a hint, and for a file of another form.
    """
    from megatron_selfdistill.data.problems import with_solutions_from

    found = {}
    for name in names:
        if name in HINT_LEVELS:
            found[name] = with_solutions_from(HINT_LEVELS[name], problems, seed)
        else:
            solutions = _solutions_in(Path(name))
            missing = [problem for problem in problems if problem.id not in solutions]
            if missing:
                raise ConfigError(
                    f"--teacher-context {name}: expected a solution for each of the {len(problems)} problems, got none "
                    f"for {missing[0].location} (problem_id {missing[0].id!r}) and {len(missing) - 1} others"
                )
            found[name] = [replace(problem, solution=solutions[problem.id]) for problem in problems]
    return found


def _solutions_in(path: Path) -> dict[str, str]:
    """Return the problem's id -> its first solution in a file.  Raises: `ConfigError`."""
    solutions: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record: Any = from_json(line)
            solutions.setdefault(str(record["problem_id"]), str(record["solution"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--teacher-context {path}:{number}: expected a JSON object with problem_id and solution, as "
                f"`selfdistill solutions` writes it ({type(error).__name__}: {error})"
            ) from None
    return solutions


if __name__ == "__main__":
    sys.exit(main())
