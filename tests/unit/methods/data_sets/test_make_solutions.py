# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands that write a model's own solutions and explanations: the same in every layout, also after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny_run
from ranks import RankError
from record_sources import load_problems
from rounded_json import read_lines

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop import conversion
from megatron_selfdistill.methods.data_sets import explanations, solution_journal, solutions

NUM_PROBLEMS, NUM_SAMPLES = 10, 8
LEARNABLE = ("--pick", "learnable")


def run_tool(arguments: list[str], main: Any = solutions.main, dies_in_group: int | None = None) -> tuple[int, str]:
    """(exit status, what was printed or complained of) on this rank; it may be killed while it writes a group down."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        if dies_in_group is not None:
            patch.setattr(solution_journal.Journal, "append", dying_append(dies_in_group))
        status = main(arguments)
    return status, output.getvalue() if status == 0 else errors.getvalue()


def dying_append(dies_in_group: int) -> Callable[[Any, list[dict]], None]:
    append, calls = solution_journal.Journal.append, []

    def append_or_die(self: Any, lines: list[dict]) -> None:
        calls.append(lines)
        if len(calls) < dies_in_group:
            return append(self, lines)
        append(self, lines[:2])
        with self.path.open("a") as file:
            file.write('{"problem_id": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)

    return append_or_die


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems with and without solutions, a tokenizer, and a random model in both formats."""
    from _lib import subtraction
    from _lib.pretraining import write_tokenizer

    directory = tmp_path_factory.mktemp("make_solutions")
    tiny_run.write_data(directory, NUM_PROBLEMS)
    records = [record | {"id": f"p{i}"} for i, record in enumerate(read_lines(directory / "problems.jsonl"))]
    write(directory / "solved.jsonl", records)
    write(directory / "problems.jsonl", [{k: v for k, v in record.items() if k != "solution"} for record in records])
    hf_models.write("qwen3", directory / "hf", vocab_size=len(subtraction.TASK.alphabet), max_position_embeddings=128)
    write_tokenizer(directory / "hf", subtraction.TASK.alphabet)
    conversion.hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def arguments_of(directory: Path, name: str, *more: str, model: str = "checkpoint.load={}/megatron") -> list[str]:
    return [
        *("--out", str(directory / name), "--num-samples", str(NUM_SAMPLES), "--keep", "2", "--group-size", "4"),
        *(f"data.path={directory}/problems.jsonl", "data.teacher_template='{problem}H{solution}|'"),
        *("rollout.max_new_tokens=28", "schedule.max_tokens=256", "optimizer=fp32"),
        *("evaluation.verifier=tiny_run.starts_with_an_even_token", model.format(directory), *more),
    ]


def made(ranks, directory: Path, name: str, *more: str, world_size: int = 1, **options: Any) -> list[str]:
    """Return the lines of the summary but for the last one, which names the file."""
    arguments = arguments_of(directory, name, f"data.tokenizer={directory}/tokenizer", *more)
    results = ranks.run(run_tool, arguments, world_size=world_size, init_process_group=False, **options)
    assert [status for status, _ in results] == [0] * world_size, results
    return results[0][1].splitlines()[:-1]


@pytest.fixture(scope="module")
def summary(directory, ranks) -> list[str]:
    return made(ranks, directory, "own.jsonl", *LEARNABLE)


def test_every_solution_is_right_says_where_it_comes_from_and_the_file_is_one_that_a_run_reads(directory, summary):
    records = read_lines(directory / "own.jsonl")
    data = {"path": f"{directory}/own.jsonl", "tokenizer": f"{directory}/tokenizer"}
    read = RunData.load(from_mapping({"data": data, "rollout": {"max_new_tokens": 28}})).problems.problems
    assert [(p.id, p.solution, p.answer) for p in read] == [(r["id"], r["solution"], r["answer"]) for r in records]
    asked = {p.id: p.messages for p in load_problems(directory / "problems.jsonl", fields={"solution": None}).problems}
    assert len(records) > len({record["problem_id"] for record in records}) >= NUM_PROBLEMS // 2
    best = {}
    for problem, record in zip(read, records, strict=True):
        assert problem.messages == asked[record["problem_id"]] and record["prompt"] == record["problem"]
        assert tiny_run.starts_with_an_even_token(record["solution"], problem)
        assert record["verdicts"][record["sample"]] and not record["truncated"][record["sample"]]
        assert record["lengths"][record["sample"]] == record["num_tokens"] > len(record["solution"])
        assert record["num_correct"] == sum(record["verdicts"]) and len(record["verdicts"]) == NUM_SAMPLES
        source = record["provenance"]
        assert source["model"] == str(directory / "megatron" / "release") and source["iteration"] == 0
        assert (source["seed"], source["num_samples"], source["pick"]) == (0, NUM_SAMPLES, "learnable")
        assert source["sampling"]["temperature"] == 1.0 and source["sampling"]["max_new_tokens"] == 28
        assert math.isfinite(record["learnability"]) and record["mean_log_prob"] < 0
        assert record["learnability"] <= best.setdefault(record["problem_id"], record["learnability"])


@pytest.mark.full
def test_without_both_weights_the_learnability_is_the_mean_log_prob(ranks, directory, summary):
    """The sampler gives the log-probs, and the pass over student and teacher gives the learnability."""
    made(ranks, directory, "bare.jsonl", *LEARNABLE, "--alpha", "0", "--ratio-weight", "0")
    records = read_lines(directory / "bare.jsonl")
    assert all(record["learnability"] == pytest.approx(record["mean_log_prob"], abs=1e-4) for record in records)
    weighted = {record["solution"]: record for record in read_lines(directory / "own.jsonl")}
    shared = [record for record in records if record["solution"] in weighted]
    assert shared and all(weighted[r["solution"]]["learnability"] < r["learnability"] - 1e-3 for r in shared)


@pytest.mark.full
def test_killed_and_started_again_it_writes_what_it_would_have_written(ranks, directory, summary):
    with pytest.raises(RankError):
        made(ranks, directory, "killed.jsonl", *LEARNABLE, dies_in_group=2)
    assert not (directory / "killed.jsonl").exists()
    assert made(ranks, directory, "killed.jsonl", *LEARNABLE) == summary
    for suffix in (".jsonl", ".attempts.jsonl"):
        assert (directory / f"killed{suffix}").read_text() == (directory / f"own{suffix}").read_text()


def test_a_group_that_was_cut_is_done_again_as_a_whole_behind_any_text_and_half_of_a_character(tmp_path):
    journal = solution_journal.Journal(tmp_path / "own.jsonl", {"model": "any"}, group_size=4)
    lines = [{"problem_id": f"p{i}", "text": "a\u2028b\x85c"} for i in range(10)]
    assert journal.begin(10) == journal.begin(10) == 0
    journal.append(lines[:6])
    with journal.path.open("ab") as file:
        file.write('{"problem_id": "é'.encode()[:-1])
    assert journal.begin(10) == 4 and list(journal.lines()) == lines[:4]
    journal.append(lines[4:])
    assert journal.begin(10) == 10 and list(journal.lines()) == lines
    journal.path.write_bytes(b'{"model": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(ConfigError, match="line 1"):
        journal.begin(3)


def test_what_is_done_is_not_done_again(ranks, directory, summary):
    before = (directory / "own.jsonl").read_bytes()
    assert made(ranks, directory, "own.jsonl", *LEARNABLE, dies_in_group=1) == summary
    assert (directory / "own.jsonl").read_bytes() == before


@pytest.mark.full
@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2"])
def test_every_layout_writes_the_same_solutions(ranks, directory, summary, layout):
    more = (*LEARNABLE, *tiny_run.TWO_RANKS[layout])
    assert made(ranks, directory, f"{layout}.jsonl", *more, world_size=2) == summary
    for wanted, got in zip(*(read_lines(directory / f"{name}.jsonl") for name in ("own", layout)), strict=True):
        for key in ("learnability", "mean_log_prob"):
            assert got.pop(key) == pytest.approx(wanted.pop(key), abs=1e-4)
        assert got == wanted


@pytest.mark.full
def test_a_hugging_face_directory_gives_the_solutions_of_its_checkpoint(ranks, directory, summary):
    arguments = arguments_of(directory, "hf.jsonl", *LEARNABLE, model="--hf={}/hf")
    ((status, _),) = ranks.run(run_tool, arguments, world_size=1, init_process_group=False)
    header, *lines = read_lines(directory / "hf.attempts.jsonl")
    assert (status, header["model"]) == (0, str(directory / "hf"))
    assert lines == read_lines(directory / "own.attempts.jsonl")[1:]
    assert not list(directory.glob(".hf.jsonl*")), "the converted model was removed"


@pytest.mark.parametrize(("named", "more"), [("keep = 2", ["--keep", "3"]), ("sampling", ["rollout.temperature=0.5"])])
def test_a_file_of_other_settings_is_not_continued(ranks, directory, summary, named, more):
    """Of other settings of any name: the journal's header holds everything that the solutions depend on."""
    before = (directory / "own.attempts.jsonl").read_bytes()
    header = read_lines(directory / "own.attempts.jsonl")[0]
    assert header.keys() >= {"model", "keep", "pick", "alpha", "ratio_weight", "prompts", "sampling", "data", "seed"}
    arguments = arguments_of(directory, "own.jsonl", f"data.tokenizer={directory}/tokenizer", *LEARNABLE, *more)
    ((status, shown),) = ranks.run(run_tool, arguments, world_size=1, init_process_group=False)
    assert status == 2 and f"was begun with {named}" in shown
    assert (directory / "own.attempts.jsonl").read_bytes() == before


def test_a_record_is_an_explanation_the_tag_and_the_given_solution(ranks, directory):
    """An untrained model writes the tag - now and then."""
    options = [f"data.path={directory}/solved.jsonl", "recipe=rlt", "method.closing_tag=-", "rollout.max_new_tokens=10"]
    made(ranks, directory, "explained.jsonl", *options, main=explanations.main)
    given = {record["problem"]: record for record in read_lines(directory / "solved.jsonl")}
    records = read_lines(directory / "explained.jsonl")
    assert len(records) > len({record["problem_id"] for record in records}) > 2
    for record in records:
        source = given[record["problem"]]
        assert record["solution"] == f"{record['explanation']}-{source['solution']}"
        assert record["explanation"] and "-" not in record["explanation"]
        assert record["answer"] == source["answer"] and record["closing_tags"][record["sample"]]
        assert record["prompt"] == f"{record['problem']}H{source['solution']}|", "the teacher sees the solution"
        assert len(record["lengths"]) == NUM_SAMPLES and record["mean_log_prob"] < 0
        assert record["provenance"]["closing_tag"] == "-" and record["provenance"]["iteration"] == 0
    data = {"path": f"{directory}/explained.jsonl", "tokenizer": f"{directory}/tokenizer"}
    read = RunData.load(from_mapping({"data": data, "rollout": {"max_new_tokens": 28}})).problems.problems
    assert [p.solution for p in read] == [record["solution"] for record in records], "a student can be tuned on them"
