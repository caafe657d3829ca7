# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command that writes a model's own solutions: right ones only, the same in every layout, also after a kill."""

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
from megatron_selfdistill.methods.data_sets import solution_journal, solutions
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.rollout.sampling import sample_seed

NUM_PROBLEMS, NUM_SAMPLES = 10, 8
LAYOUTS = {
    "DP2": [],
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
}


def run_tool(arguments: list[str], dies_in_group: int | None = None) -> tuple[int, str]:
    """(exit status, what was printed or complained of) on this rank; it may be killed while it writes a group down."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        if dies_in_group is not None:
            patch.setattr(solution_journal.Journal, "append", dying_append(dies_in_group))
        status = solutions.main(arguments)
    return status, output.getvalue() if status == 0 else errors.getvalue()


def run_tool_often(command_lines: list[list[str]]) -> list[tuple[int, str]]:
    """Return the exit status and the output of `run_tool` for each of the command lines."""
    return [run_tool(arguments) for arguments in command_lines]


def dying_append(dies_in_group: int) -> Callable[[Any, list[dict]], None]:
    """Return a `Journal.append` that is killed while it writes that group down."""
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


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems without solutions, a tokenizer, and a random model as a Hugging Face directory and as a checkpoint."""
    from _lib import subtraction
    from _lib.pretraining import write_tokenizer

    directory = tmp_path_factory.mktemp("make_solutions")
    tiny_run.write_data(directory, NUM_PROBLEMS)
    records = [json.loads(line) for line in (directory / "problems.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        record["id"] = f"p{number}"
        del record["solution"]
    write(directory / "problems.jsonl", records)
    write(directory / "unanswered.jsonl", [{"problem": "1-1:"}])
    hf_models.write("qwen3", directory / "hf", vocab_size=len(subtraction.TASK.alphabet), max_position_embeddings=128)
    write_tokenizer(directory / "hf", subtraction.TASK.alphabet)
    conversion.hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def arguments_of(directory: Path, name: str, *more: str, model: str = "checkpoint.load={}/megatron") -> list[str]:
    return [
        *("--out", str(directory / name)),
        *("--num-samples", str(NUM_SAMPLES), "--keep", "2", "--group-size", "4"),
        f"data.path={directory}/problems.jsonl",
        f"data.tokenizer={directory}/tokenizer",
        "data.teacher_template='{problem}H{solution}|'",
        "rollout.max_new_tokens=28",
        "schedule.max_tokens=256",
        "optimizer=fp32",
        "evaluation.verifier=tiny_run.starts_with_an_even_token",
        *([model.format(directory)] if model else []),
        *more,
    ]


def made(ranks, arguments: list[str], world_size: int = 1, **options: Any) -> str:
    results = ranks.run(run_tool, arguments, world_size=world_size, init_process_group=False, **options)
    assert [status for status, _ in results] == [0] * world_size, results
    return results[0][1]


@pytest.fixture(scope="module")
def summary(directory, ranks) -> str:
    """Return the summary of own.jsonl, which one rank makes without interruption."""
    return made(ranks, arguments_of(directory, "own.jsonl", "--pick", "learnable"))


def test_every_solution_is_right_and_the_file_is_one_that_a_run_reads(directory, summary):
    records = read_lines(directory / "own.jsonl")
    data = {"path": f"{directory}/own.jsonl", "tokenizer": f"{directory}/tokenizer"}
    read = RunData.load(from_mapping({"data": data, "rollout": {"max_new_tokens": 28}})).problems.problems
    assert [(p.id, p.solution, p.answer) for p in read] == [(r["id"], r["solution"], r["answer"]) for r in records]
    asked = {p.id: p.messages for p in load_problems(directory / "problems.jsonl", fields={"solution": None}).problems}
    assert len(records) > len({record["problem_id"] for record in records}) >= NUM_PROBLEMS // 2
    for problem, record in zip(read, records, strict=True):
        assert problem.messages == asked[record["problem_id"]]
        assert tiny_run.starts_with_an_even_token(record["solution"], problem)
        assert record["verdicts"][record["sample"]] and not record["truncated"][record["sample"]]
        assert record["lengths"][record["sample"]] == record["num_tokens"] > len(record["solution"])
        assert record["num_correct"] == sum(record["verdicts"]) and len(record["verdicts"]) == NUM_SAMPLES


def test_each_line_says_where_it_comes_from(directory, summary):
    for record in read_lines(directory / "own.jsonl"):
        source = record["provenance"]
        assert source["model"] == str(directory / "megatron" / "release") and source["iteration"] == 0
        assert (source["seed"], source["num_samples"], source["pick"]) == (0, NUM_SAMPLES, "learnable")
        assert source["sampling"]["temperature"] == 1.0 and source["sampling"]["max_new_tokens"] == 28
        assert (
            record["prompt"] == record["problem"]
            and math.isfinite(record["learnability"])
            and record["mean_log_prob"] < 0
        )
    best, second = {}, {}
    for record in read_lines(directory / "own.jsonl"):
        (second if record["id"].endswith("#2") else best)[record["problem_id"]] = record["learnability"]
    assert second and all(best[name] >= value for name, value in second.items())


def test_without_both_weights_the_learnability_is_the_mean_log_prob(ranks, directory, summary):
    """The sampler gives the log-probs, and the pass over student and teacher gives the learnability."""
    made(ranks, arguments_of(directory, "bare.jsonl", "--pick", "learnable", "--alpha", "0", "--ratio-weight", "0"))
    records = read_lines(directory / "bare.jsonl")
    assert all(record["learnability"] == pytest.approx(record["mean_log_prob"], abs=1e-4) for record in records)
    weighted = {record["solution"]: record for record in read_lines(directory / "own.jsonl")}
    shared = [record for record in records if record["solution"] in weighted]
    assert shared and all(weighted[r["solution"]]["learnability"] < r["learnability"] - 1e-3 for r in shared)


@pytest.mark.full
@pytest.mark.parametrize("dies_in_group", [2, 3])
def test_killed_and_started_again_it_writes_what_it_would_have_written(ranks, directory, summary, dies_in_group):
    name = f"killed_{dies_in_group}.jsonl"
    arguments = arguments_of(directory, name, "--pick", "learnable")
    with pytest.raises(RankError):
        made(ranks, arguments, dies_in_group=dies_in_group)
    assert not (directory / name).exists()
    assert made(ranks, arguments).splitlines()[:-1] == summary.splitlines()[:-1]
    assert (directory / name).read_text() == (directory / "own.jsonl").read_text()
    attempts = f"{name.removesuffix('.jsonl')}.attempts.jsonl"
    assert (directory / attempts).read_text() == (directory / "own.attempts.jsonl").read_text()


def test_a_group_that_was_cut_is_done_again_as_a_whole(tmp_path):
    journal = solution_journal.Journal(tmp_path / "own.jsonl", {"model": "any"}, group_size=4)
    lines = [{"problem_id": f"p{i}"} for i in range(10)]
    assert journal.begin(10) == journal.begin(10) == 0
    journal.append(lines[:6])
    with journal.path.open("a") as file:
        file.write('{"problem_id": "p')
    assert journal.begin(10) == 4 and list(journal.lines()) == lines[:4]
    journal.append(lines[4:])
    assert journal.begin(10) == 10 and list(journal.lines()) == lines


def test_a_journal_goes_on_behind_any_text_and_half_of_a_character(tmp_path):
    journal = solution_journal.Journal(tmp_path / "own.jsonl", {"model": "any"}, group_size=1)
    lines = [{"problem_id": "p0", "text": "a\u2028b\x85c"}, {"problem_id": "p1", "text": "é"}]
    assert journal.begin(3) == 0
    journal.append(lines)
    with journal.path.open("ab") as file:
        file.write('{"problem_id": "é'.encode()[:-1])
    assert journal.begin(3) == 2 and list(journal.lines()) == lines
    journal.path.write_bytes(b'{"model": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(ConfigError, match=r"line 1 is not JSON in UTF-8 .*: remove it and the lines after it"):
        journal.begin(3)


def test_what_is_done_is_not_done_again(ranks, directory, summary):
    before = (directory / "own.jsonl").read_bytes()
    arguments = arguments_of(directory, "own.jsonl", "--pick", "learnable")
    assert made(ranks, arguments, dies_in_group=1) == summary
    assert (directory / "own.jsonl").read_bytes() == before


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_same_solutions(ranks, directory, summary, layout):
    name = f"{layout}.jsonl"
    arguments = arguments_of(directory, name, "--pick", "learnable", *LAYOUTS[layout])
    assert made(ranks, arguments, world_size=2).splitlines()[:-1] == summary.splitlines()[:-1]
    for expected, got in zip(read_lines(directory / "own.jsonl"), read_lines(directory / name), strict=True):
        for key in ("learnability", "mean_log_prob"):
            assert got.pop(key) == pytest.approx(expected.pop(key), abs=1e-4)
        assert got == expected


def run_tool_without_projecting(arguments: list[str]) -> tuple[int, str]:
    """`run_tool` where nothing can make the logits of a whole microbatch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(schedule, "project")
        return run_tool(arguments)


@pytest.mark.full
def test_where_the_output_layer_is_fused_candidates_are_scored_in_chunks(ranks, directory, summary):
    arguments = arguments_of(directory, "fused.jsonl", "--pick", "learnable", "loss.fused=low_memory")
    arguments.append("loss.fused_chunk_tokens=5")
    ((status, shown),) = ranks.run(run_tool_without_projecting, arguments, world_size=1, init_process_group=False)
    assert status == 0 and shown.splitlines()[:-1] == summary.splitlines()[:-1]
    for expected, got in zip(read_lines(directory / "own.jsonl"), read_lines(directory / "fused.jsonl"), strict=True):
        assert got.pop("learnability") == pytest.approx(expected.pop("learnability"), abs=1e-6)
        assert got == expected


@pytest.mark.full
def test_a_hugging_face_directory_gives_the_solutions_of_its_checkpoint(ranks, directory, summary):
    bare = [
        a for a in arguments_of(directory, "hf.jsonl", "--hf", f"{directory}/hf", model="") if "data.tokenizer" not in a
    ]
    made(ranks, [*bare, "--pick", "learnable"])
    assert read_lines(directory / "hf.attempts.jsonl")[0]["model"] == str(directory / "hf")
    assert read_lines(directory / "hf.attempts.jsonl")[1:] == read_lines(directory / "own.attempts.jsonl")[1:]
    assert not list(directory.glob(".hf.jsonl*")), "the converted model was removed"


@pytest.mark.full
def test_its_samples_are_no_rollouts_and_depend_on_the_seed(ranks, directory, summary):
    made(ranks, arguments_of(directory, "seed.jsonl", "--pick", "learnable", "seed=1"))
    lengths = [
        [line["lengths"] for line in read_lines(directory / f"{name}.attempts.jsonl")[1:]] for name in ("own", "seed")
    ]
    assert lengths[0] != lengths[1]
    assert sample_seed(0, 0, "p0", 0) != sample_seed(0, 0, "solution/p0", 0)


def refusals(ranks, command_lines: list[list[str]]) -> list[str]:
    """Assert that every command line is refused with one line, and return the lines; one rank tries all."""
    (results,) = ranks.run(run_tool_often, command_lines, world_size=1, init_process_group=False)
    assert all(status == 2 and len(shown.strip().splitlines()) == 1 for status, shown in results), results
    return [shown for _, shown in results]


OTHER_SETTINGS = {
    "was begun with keep = 2, and now it is 3": ["--pick", "learnable", "--keep", "3"],
    "was begun with sampling = ": ["--pick", "learnable", "rollout.temperature=0.5"],
}


def test_a_file_of_other_settings_is_not_continued(ranks, directory, summary):
    """Of other settings of any name: the journal's header holds everything that the solutions depend on."""
    before = (directory / "own.attempts.jsonl").read_bytes()
    header = read_lines(directory / "own.attempts.jsonl")[0]
    assert header.keys() >= {"model", "keep", "pick", "alpha", "ratio_weight", "prompts", "sampling", "data", "seed"}
    command_lines = [arguments_of(directory, "own.jsonl", *more) for more in OTHER_SETTINGS.values()]
    for words, shown in zip(OTHER_SETTINGS, refusals(ranks, command_lines), strict=True):
        assert words in shown
    assert (directory / "own.attempts.jsonl").read_bytes() == before
