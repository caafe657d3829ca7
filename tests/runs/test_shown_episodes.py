# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run with an environment shows each episode as one conversation, with what belongs to each of its turns."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reported_runs import blocks_of
from tiny_run import overrides, reproducible_metrics, train

from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.instruments.explorer.target_page import explored_files, read_explored
from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_metrics, read_samples
from megatron_selfdistill.rollout.base import Response, response_text

TURN = ("episode", "turn", "reward", "hint", "reply")
RUNS = {
    "by_turn": ["environment.name=sessions.Guiding", "environment.max_turns=3"],
    "one_sequence": [
        *("environment.name=replying.Replying", "environment.max_turns=3"),
        "environment.limits={one_sequence: true}",
    ],
    "unseen": ["environment.name=sessions.Guiding", "environment.max_turns=3", "metrics.show_samples=0"],
}
EPISODES = ("by_turn", "one_sequence")


def arguments(data: Path, directory: Path, name: str, early: str) -> list[str]:
    """Return the arguments of a run of one step with an evaluation, which shows three problems."""
    tiny = ["data.global_batch_size=4", "rollout.num_samples=2", "rollout.max_new_tokens=10", "num_steps=1", early]
    tiny += ["data.on_long_context=drop", "metrics.show_samples=3", "metrics.explore_samples=3", "report.every=1"]
    tiny += ["recipe=default", "method.name=opsd_rl", "evaluation.verifier=exact_match", "evaluation.every=1"]
    tiny += [f"evaluation.path={data}/problems.jsonl", "evaluation.limit=2"]
    return overrides(data, directory / name, *tiny, *RUNS[name])


@pytest.fixture(scope="module")
def run_of(ranks, data, early, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that returns the directory of a finished run of `RUNS`, trained at the first call."""
    directory = tmp_path_factory.mktemp("shown")

    @functools.cache
    def finished(name: str) -> Path:
        train(ranks, arguments(data, directory, name, early))
        return directory / name

    return finished


def assert_says_what_belongs_to_its_turn(record: dict[str, Any], data: Path, name: str) -> None:
    """Compare the record of a turn with the replies of `Replying`, and its hint with those of `Guiding`."""
    problems = map(json.loads, (data / "problems.jsonl").read_text().splitlines())
    solutions = {problem["id"]: problem["solution"] for problem in problems}
    said = response_text(Response.unsampled(record["tokens"]["id"]), load_tokenizer(data / "tokenizer"))
    is_even, number = sum(map(ord, said)) % 2 == 0, record["turn"]
    assert record["reward"] == (0.0 if record["truncated"] else float(is_even))
    assert record["reply"] == (None if record["truncated"] else f"X{number + 1}")
    is_guided = name == "by_turn" and number > 0
    assert record["hint"] == (str(number) if is_guided else solutions[record["problem_id"]])


@pytest.mark.parametrize("name", EPISODES)
def test_samples_hold_all_turns_of_an_episode_with_reward_hint_and_reply(run_of, data, name):
    records = read_samples(run_of(name))
    grouped = itertools.groupby(records, key=lambda one: (one["problem_id"], one["episode"]))
    episodes = [[turn["turn"] for turn in turns] for _, turns in grouped]
    assert len(episodes) == 3 and any(len(turns) > 1 for turns in episodes)
    assert episodes == [[*range(len(turns))] for turns in episodes]
    for record in records:
        assert_says_what_belongs_to_its_turn(record, data, name)


@pytest.mark.full
@pytest.mark.parametrize("name", EPISODES)
def test_turns_that_move_between_replicas_take_along_what_belongs_to_them(ranks, data, early, tmp_path, name):
    train(ranks, arguments(data, tmp_path, name, early), 2)
    records = read_samples(tmp_path / name)
    assert any(record["turn"] for record in records)
    for record in records:
        assert_says_what_belongs_to_its_turn(record, data, name)


@pytest.mark.parametrize("name", EPISODES)
def test_the_report_has_the_turns_of_each_episode_with_their_marks(run_of, name):
    blocks = blocks_of((run_of(name) / "report.html").read_text())
    (shown,), samples = blocks["samples"], read_samples(run_of(name))
    assert [[one[key] for key in TURN] for one in shown] == [[one[key] for key in TURN] for one in samples]
    for one, sample in zip(shown, samples, strict=True):
        assert [text for text, *_ in one["tokens"]] == sample["tokens"]["text"]
        assert any(difference is not None for _, difference, *_ in one["tokens"])


@pytest.mark.parametrize("name", EPISODES)
def test_the_explorer_has_the_first_turns_with_the_numbers_of_the_samples(run_of, name):
    explored = [read_explored(path) for path in explored_files(run_of(name))]
    samples = read_samples(run_of(name))[:3]
    assert len(explored) == 3 and any(record["turn"] for record in explored)
    for record, sample in zip(explored, samples, strict=True):
        assert {key: record[key] for key in (*TURN, "prompt")} == {key: sample[key] for key in (*TURN, "prompt")}
        assert record["tokens"]["loss"] == pytest.approx(sample["tokens"]["loss"], rel=2e-4, abs=2e-6)
    (links,) = blocks_of((run_of(name) / "report.html").read_text())["overview"]["explored"]
    assert [link["turn"] for link in links] == [record["turn"] + 1 for record in explored]


@pytest.mark.parametrize("name", EPISODES)
def test_an_evaluation_of_the_run_plays_episodes_and_measures_their_rewards(run_of, name):
    (measured,) = [line for line in read_metrics(run_of(name)) if "evaluation/greedy_mean_reward" in line]
    said = [record for record in read_evaluation_samples(run_of(name)) if record["sample"] is None]
    turns, rewards = [], []
    for record in said:
        parts = record["response"].split("\n--- turn ")
        texts = [part.partition("\n--- reply\n")[0].rpartition("\n")[2] for part in parts]
        turns.append(len(parts))
        rewards.append(sum(sum(map(ord, text)) % 2 == 0 for text in texts[: len(parts) - record["truncated"]]))
    assert measured["evaluation/greedy_mean_turns"] == sum(turns) / 2 and len(said) == 2
    assert measured["evaluation/greedy_mean_reward"] == sum(rewards) / 2
    assert max(turns) <= 3 and "evaluation/sampled_mean_reward" in measured


@pytest.mark.full
def test_showing_episodes_changes_no_number_of_the_run(run_of):
    assert reproducible_metrics(run_of("by_turn")) == reproducible_metrics(run_of("unseen"))
