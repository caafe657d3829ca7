# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Samples of responses: the same tokens and numbers in every layout, readable everywhere, and never in a run's way."""

from __future__ import annotations

import io
import json
import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import tiny_run
from rich.console import Console
from rounded_json import read_lines
from tiers import combinations

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.due import samples_due, tokens_measured
from megatron_selfdistill.config.schema.run_config import MetricsConfig
from megatron_selfdistill.data.contexts import ContextPair, EpisodeTurn
from megatron_selfdistill.loss import Status
from megatron_selfdistill.metrics.log import MetricsLog
from megatron_selfdistill.metrics.run_log import read_samples
from megatron_selfdistill.metrics.samples import (
    NUMBERS,
    Sample,
    SampleToken,
    SeenHint,
    chosen,
    console_text,
    sample_html,
    sample_of,
)


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def sample(text: str, problem_id: str = "p7") -> Sample:
    tokens = (SampleToken(1, text, 0.1, -2.0, -2.0, 1.25, "matched"),)
    return Sample(problem_id=problem_id, prompt="1+1=", solution="two", tokens=tokens, truncated=False)


def context(problem_id: str, response: list[int]) -> ContextPair:
    return ContextPair(problem_id, [0, 1], [2, 3, 0, 1], response, truncated=False)


def test_the_first_response_of_each_of_the_first_problems_is_chosen_with_its_span():
    contexts = [context("a", [1, 2]), context("a", [3]), context("b", [4, 5, 6]), context("c", [7])]
    assert chosen(contexts, 2) == [(contexts[0], range(0, 2)), (contexts[2], range(3, 6))]
    assert len(chosen(contexts, 9)) == 3 and chosen([], 2) == []


def in_episode(problem_id: str, response: list[int], episode: int, turn: int) -> ContextPair:
    place = EpisodeTurn(episode=episode, turn=turn, reward=0.5, hint="go", reply="a room")
    return replace(context(problem_id, response), turn=place)


def test_a_response_of_an_episode_is_chosen_with_the_other_turns_of_the_episode_each_once():
    contexts = [
        in_episode("a", [1, 2], 1, 0),
        in_episode("a", [3], 1, 1),
        in_episode("a", [4], 0, 0),  # another episode
        in_episode("b", [5, 6, 7], 0, 2),  # whose earlier turns are on another replica
        context("c", [8]),
        context("a", [9]),  # a text that a method has added
        in_episode("a", [3], 1, 1),  # the same turn, read by another teacher
        in_episode("a", [3, 3], 1, 2),
        context("c", [8]),
    ]
    of_a = [(contexts[0], range(0, 2)), (contexts[1], range(2, 3)), (contexts[7], range(10, 12))]
    assert chosen(contexts, 1) == of_a
    assert chosen(contexts, 3) == [*of_a[:2], (contexts[3], range(4, 7)), (contexts[4], range(7, 8)), of_a[2]]


def test_a_sample_holds_each_tokens_text_and_numbers():
    values = [[0.5, 0.25], [-1.0, -3.0], [-4.0, -2.5], [0.8, 0.625], [0.0, 1.0]]
    names = ("loss", "student_log_prob", "teacher_log_prob", "beta", "status")
    found = sample_of(context("a", [4, 5]), SeenHint("the hint"), dict(zip(names, values, strict=True)), Letters())
    assert (found.prompt, found.response, found.solution, found.truncated) == ("ab", "ef", "the hint", False)
    assert found.tokens[0] == SampleToken(4, "e", 0.5, -1.0, -4.0, 1.25, Status.MATCHED.name.lower())
    assert [t.log_ratio for t in found.tokens] == [-3.0, 0.5] and found.tokens[1].status == "capped"
    assert found.record()["tokens"]["k"] == [1.25, 1.6] and found.record()["tokens"]["text"] == ["e", "f"]


def test_without_a_teacher_a_response_is_shown_without_marks():
    numbers = {name: [math.nan] for name in NUMBERS} | {"loss": [0.5], "student_log_prob": [-0.5], "status": [0.0]}
    found = sample_of(context("a", [4]), SeenHint(""), numbers, Letters())
    assert not found.has_teacher and found.record()["tokens"]["teacher_log_prob"] == [None]
    for text in (console_text(found, "step 1", coloured=False).plain, sample_html(found)):
        assert "e" in text and "hint" not in text and "marks" not in text and "largest loss" not in text


def test_what_could_steer_a_terminal_is_shown_as_its_escape_also_in_the_id_of_a_problem():
    text = console_text(sample("\x1b[2Jgone\u202e\ttab\n 你好 👩\u200d🔬"), "", coloured=True).plain
    assert "\\x1b[2Jgone\\u202e\ttab\n 你好 👩\u200d🔬" in text and "\x1b" not in text
    for coloured in (False, True):
        text = console_text(sample("a", "id0\x1b]52;c;eA==\x07"), "step 1", coloured=coloured).plain
        assert text.startswith("--- step 1: problem id0\\x1b]52;c;eA==\\x07\n")


def test_a_sample_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    output = Console(file=io.StringIO(), force_terminal=False, width=200)

    def broken() -> list[Sample]:
        raise OverflowError("token 7 is out of range")

    with closing(MetricsLog(tmp_path, num_steps=9, output=output)) as log:
        log.resume(0)
        log.log_samples(3, broken)
        log.log(3, {"loss/mean": 0.5})
    text = output.file.getvalue()
    assert "warning: " in text and "token 7 is out of range\n" in text and "loss 0.5000" in text
    assert read_samples(tmp_path) == [] and not caplog.records


def test_samples_are_due_at_the_first_step_and_then_at_every_so_many():
    some, none = (Config(metrics=MetricsConfig(**keys)) for keys in ({"show_samples_every": 5}, {"show_samples": 0}))
    assert [step for step in range(1, 12) if samples_due(some, step)] == [1, 5, 10]
    assert not any(samples_due(none, step) for step in range(1, 12))
    assert [tokens_measured(Config(), step) for step in (1, 2, 10, 11)] == [8, None, 8, None]


@pytest.mark.full
def test_samples_have_the_teachers_numbers_at_every_token_of_a_step_that_measures_few(ranks, own_data, start, one):
    options = [start, f"tests.replay={own_data}/one.jsonl", "metrics.show_samples=4", "metrics.measure_every_token=8"]
    tiny_run.train(ranks, run_of(own_data, "few", *options))
    for record in read_samples(own_data / "few"):
        tokens = one[record["problem_id"]]["tokens"]
        assert record["tokens"]["teacher_log_prob"] == tokens["teacher_log_prob"] and 0.0 not in tokens["k"]
    of_all, of_few = (read_lines(own_data / name / "metrics.jsonl")[0] for name in ("one", "few"))
    assert of_all["loss/mean"] == of_few["loss/mean"]
    assert of_all["entropy/teacher"] != of_few["entropy/teacher"]


@pytest.mark.full
@combinations(name=["alone", "PP2xCP2"])
def test_a_response_has_what_any_hint_does_and_what_only_its_own_says(ranks, own_data, name):
    world_size, layout, _ = RUNS.get(name, (1, [], []))
    options = ["target.control=other", "target.num_controls=1", "target.anchor=student", "metrics.show_samples=4"]
    options += ["rollout.num_samples=1", "data.global_batch_size=4", "metrics.measure_every_token=1", *layout]
    tiny_run.train(ranks, run_of(own_data, f"controls {name}", *options), world_size=world_size)
    metrics = read_lines(own_data / f"controls {name}" / "metrics.jsonl")[0]
    records = read_samples(own_data / f"controls {name}")
    assert len(records) == 4, "all responses of the step"
    for part in ("general", "specific"):
        numbers = [number for record in records for number in record["tokens"][part]]
        assert sum(numbers) / len(numbers) == pytest.approx(metrics[f"control/{part}"], rel=1e-4) and min(numbers) >= 0


def run_of(own_data: Any, name: str, *options: str) -> list[str]:
    return tiny_run.overrides(own_data, own_data / name, "num_steps=1", "checkpoint.save_every=0", *options)


@pytest.fixture(scope="module")
def start(finished) -> str:
    return f"checkpoint.load={finished}/checkpoints"


@pytest.fixture(scope="module")
def one(ranks, own_data, start) -> dict[str, Any]:
    options = [start, f"tests.record={own_data}/one.jsonl", "metrics.show_samples=4"]
    tiny_run.train(ranks, run_of(own_data, "one", *options))
    return {record["problem_id"]: record for record in read_samples(own_data / "one")}


RUNS = {
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"], [0, 1]),
    "DP2": (2, [], [0, 2]),
    "PP2xCP2": (4, ["parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"], [0, 1]),
}


@combinations(name=list(RUNS), quick={"name": ["DP2"]}, strength=1)
def test_a_run_shows_the_tokens_and_numbers_of_an_unsharded_one(ranks, own_data, start, one, name):
    world_size, layout, problems = RUNS[name]
    tiny_run.train(ranks, run_of(own_data, name, start, f"tests.replay={own_data}/one.jsonl", *layout), world_size)
    found = read_samples(own_data / name)
    assert [record["problem_id"] for record in found] == [list(one)[index] for index in problems]
    for record in found:
        expected = one[record["problem_id"]]
        assert record | {"tokens": None} == expected | {"tokens": None}
        for key, values in expected["tokens"].items():
            rounded = values if key in ("id", "text", "status") else pytest.approx(values, abs=1e-4)
            assert record["tokens"][key] == rounded, key


def test_a_sample_is_what_was_recorded_behind_what_the_data_has(own_data, one):
    recorded = tiny_run.recorded(own_data / "one.jsonl", step=0)
    problems = {p["id"]: p for p in map(json.loads, (own_data / "problems.jsonl").read_text().splitlines())}
    assert len(one) == 4
    for problem_id, record in one.items():
        assert record["tokens"]["id"] == recorded[problem_id, 0]
        assert record["response"] == "".join(record["tokens"]["text"])
        assert all(record[key] == problems[problem_id][own] for key, own in (("prompt", "problem"), ("solution",) * 2))
