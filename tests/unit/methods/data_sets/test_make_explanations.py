# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A trained teacher writes explanations, the same in every layout, and a student learns from them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_run
from rounded_json import read_lines

from megatron_selfdistill.methods.data_sets import explanations

NUM_PROBLEMS, NUM_SAMPLES = 10, 4
TAG = "method.closing_tag=-"  # a character that an untrained model writes now and then
SHORT = ["rollout.max_new_tokens=10", "data.global_batch_size=2", "num_steps=1", "checkpoint.save_every=0"]
LAYOUTS = {
    "DP2": [],
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}


def run_tool(arguments: Sequence[str]) -> tuple[int, str]:
    """Return exit status and output of the command on this rank."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = explanations.main(list(arguments))
    return status, output.getvalue() if status == 0 else errors.getvalue()


@pytest.fixture(scope="module")
def directory(ranks, tmp_path_factory) -> Path:
    """Return a directory with problems and a teacher that `recipe=rlt` has trained for a step."""
    directory = tmp_path_factory.mktemp("make_explanations")
    tiny_run.write_data(directory, NUM_PROBLEMS)
    arguments = tiny_run.overrides(directory, directory / "rlt", *SHORT, TAG, "rollout.num_samples=2")
    tiny_run.train(ranks, ["recipe=rlt", *arguments])
    return directory


def arguments_of(directory: Path, name: str, *more: str) -> list[str]:
    return [
        *("--out", str(directory / name), "--num-samples", str(NUM_SAMPLES), "--keep", "2", "--group-size", "4"),
        "recipe=rlt",
        f"checkpoint.load={directory}/rlt/checkpoints",
        f"data.path={directory}/problems.jsonl",
        f"data.tokenizer={directory}/tokenizer",
        "data.teacher_template='{problem}H{solution}|'",
        *("rollout.max_new_tokens=10", "schedule.max_tokens=256", "optimizer=fp32", TAG),
        *more,
    ]


def made(ranks, arguments: Sequence[str], world_size: int = 1) -> str:
    results = ranks.run(run_tool, arguments, world_size=world_size, init_process_group=False)
    assert [status for status, _ in results] == [0] * world_size, results
    return results[0][1]


@pytest.fixture(scope="module")
def summary(ranks, directory) -> str:
    """Return the summary of explained.jsonl, which one rank makes without interruption."""
    return made(ranks, arguments_of(directory, "explained.jsonl"))


def test_a_record_is_an_explanation_the_tag_and_the_given_solution(directory, summary):
    records = read_lines(directory / "explained.jsonl")
    given = {record["problem"]: record for record in read_lines(directory / "problems.jsonl")}
    assert len(records) > len({record["problem_id"] for record in records}) > 2
    for record in records:
        source = given[record["problem"]]
        assert record["solution"] == f"{record['explanation']}-{source['solution']}"
        assert record["explanation"] and "-" not in record["explanation"]
        assert record["answer"] == source["answer"] and record["closing_tags"][record["sample"]]
        assert record["prompt"] == f"{record['problem']}H{source['solution']}|", "the teacher sees the solution"
        assert len(record["lengths"]) == NUM_SAMPLES and record["mean_log_prob"] < 0
        assert record["provenance"]["closing_tag"] == "-" and record["provenance"]["iteration"] == 1


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_same_explanations(ranks, directory, summary, layout):
    made(ranks, arguments_of(directory, f"{layout}.jsonl", *LAYOUTS[layout]), world_size=2)
    for expected, got in zip(
        read_lines(directory / "explained.jsonl"), read_lines(directory / f"{layout}.jsonl"), strict=True
    ):
        assert got.pop("mean_log_prob") == pytest.approx(expected.pop("mean_log_prob"), abs=1e-4)
        assert got == expected


def test_a_student_is_fine_tuned_on_the_explanations(ranks, directory, summary):
    run = directory / "student"
    data = [f"data.path={directory}/explained.jsonl", "method.name=sft", "rollout.max_new_tokens=20"]
    tiny_run.train(ranks, tiny_run.overrides(directory, run, *SHORT, *data))
    (step,) = tiny_run.reproducible_metrics(run)
    assert step["gradient_norm"] > 0
    lengths = [len(record["solution"]) + 1 for record in read_lines(directory / "explained.jsonl")]
    assert min(lengths) <= step["response/length_mean"] <= max(lengths)
