# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records that some rows of 10_recipes.py train on in place of the problems: work, skills, logs, explanations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from _lib import checked_subtraction, subtraction, subtraction_chats
from _lib.command_line import CONFIG_NAME
from _lib.pretraining import Base, write_records
from megatron_selfdistill import config as configuration


def logged_conversations(base: Base, directory: Path) -> tuple[Path, Path]:
    """Write a log of conversations between the base and a user who checks its answers; return it and its chat template.

    The base answers the training problems at temperature 1, one response each; see `checked_subtraction.conversation`.
    """
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.rollout.base import Request, response_text
    from megatron_selfdistill.rollout.sampling import sample_seed

    pairs = subtraction.distinct(subtraction.NUM_TRAINING, "train", seed=777 + base.seed)
    overrides = [*base.overrides, f"data.path={base.held_out}", f"run_dir={directory / 'logged'}"]
    config = configuration.load(overrides, CONFIG_NAME)
    run_data = RunData.load(config)
    requests = [
        Request(run_data.tokenizer.encode(subtraction.problem_text(a, b)), sample_seed(base.seed, 0, f"log/{a}-{b}", 0))
        for a, b in pairs
    ]
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with open_inference(config, run_data, grid) as inference:
            responses = inference.sampler.generate(requests, inference.sampling)
    finally:
        ranks.shutdown()
    attempts = [response_text(response, run_data.tokenizer) for response in responses]
    records = [checked_subtraction.conversation(a, b, text) for (a, b), text in zip(pairs, attempts, strict=True)]
    template = directory / "chat_template.jinja"
    template.write_text(subtraction_chats.CHAT_TEMPLATE, encoding="utf-8")
    return write_records(directory / "conversations.jsonl", records), template


def worked_problems(problems: Path, directory: Path) -> Path:
    """Write the subtractions of ``problems`` with the whole right response as their solution; return the file."""
    return _with_solutions(problems, directory / "worked.jsonl", lambda a, b: subtraction.work(a, b)[:-1])


def problems_with_skills(problems: Path, directory: Path) -> Path:
    """Write the subtractions of ``problems`` with their skill in the place of the solution; return the file."""
    return _with_solutions(problems, directory / "skills.jsonl", checked_subtraction.skill)


def _with_solutions(problems: Path, file: Path, solution: Callable[[int, int], str]) -> Path:
    records = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    pairs = [tuple(int(number) for number in record["problem"].rstrip(":").split("-")) for record in records]
    return write_records(file, [one | {"solution": solution(a, b)} for one, (a, b) in zip(records, pairs, strict=True)])


def explained_problems(
    teacher: Path, base: Base, problems: Path, directory: Path, settings: Sequence[str], name: str
) -> Path:
    """Write explanations of the solutions of ``problems`` as a data set for a student; return the file.

    ``teacher``: the checkpoint of the model that explains; ``settings``: the overrides of its training; ``name``: the
    name of the file.  `selfdistill explanations` does the work.
    """
    from megatron_selfdistill.methods.data_sets import explanations

    out = directory / f"{name}.jsonl"
    options = ["--out", str(out), "--config-name", CONFIG_NAME]
    status = explanations.main(
        [*options, *base.overrides, *settings, f"data.path={problems}", f"checkpoint.load={teacher}"]
    )
    if status != 0:
        raise RuntimeError(f"selfdistill explanations ended with status {status}")
    return out
