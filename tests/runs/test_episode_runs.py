# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with an environment: resumed, replayed, equal in every layout, and shown as one conversation each."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import RankError
from reported_runs import blocks_of
from rounded_json import read_lines
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_equal_runs,
    assert_steps_equal,
    reproducible_metrics,
    saved_step,
    start_with,
    train,
)

from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.instruments.explorer.target_page import explored_files, read_explored
from megatron_selfdistill.metrics.run_log import read_samples
from megatron_selfdistill.rollout.base import Response, response_text

DEFAULT, TURNS = ["recipe=default", "method.name=opsd_rl"], "environment.max_turns=3"
ONE_SEQUENCE = "environment.limits={one_sequence: true}"
REPLYING = "environment.name=replying.Replying"
RECIPES = {
    "default": [*DEFAULT, REPLYING, TURNS],
    "rltf_sd": ["recipe=rltf_sd", REPLYING, "method.revision_min_log_prob=null"],
    "rltf_fm": ["recipe=rltf_fm", REPLYING, "method.reply_template='{problem}{response}'"],
    "sessions": [*DEFAULT, "environment.name=sessions.Opened", TURNS],
    "one_sequence": [*DEFAULT, REPLYING, TURNS, ONE_SEQUENCE],
}
LAYOUTS_OF_RECORDED = [("rltf_sd", "TP2"), ("rltf_sd", "DP2"), ("rltf_fm", "PP2"), ("rltf_fm", "CP2")]
COMPARED = ("terms/", "rewards/", "episodes/", "loss/")
TINY = (
    *("data.global_batch_size=4", "rollout.num_samples=2", "rollout.max_new_tokens=10", "data.on_long_context=drop"),
    *("optimizer.lr_warmup_steps=0", "num_steps=2", "checkpoint.save_every=1"),
)


@pytest.fixture(scope="module")
def of(early) -> Callable[..., list[str]]:
    return lambda recipe, *more: [early, *TINY, *RECIPES[recipe], *more]


def start_turn_by_turn(arguments: list[str]) -> int:
    """Start a run whose training reads each turn of an episode by itself, whatever its prompts are."""
    from megatron_selfdistill.pipeline import configured_packing

    return start_with(arguments, configured_packing, "joins_turns", lambda config: False)


def start_and_die_in_a_second_turn(arguments: list[str]) -> int:
    """Start a run that kills itself once it has sampled the second turns of its second step."""
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    generate, calls = MegatronSampler.generate, itertools.count()

    def generate_or_die(self: Any, requests: Any, params: Any) -> Any:
        responses = generate(self, requests, params)
        if self._version == 1 and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return responses

    return start_with(arguments, MegatronSampler, "generate", generate_or_die)


def turns_of(run: Path, step: int) -> dict[tuple[str, int, int], list[int]]:
    """Return the recorded responses of a step: (problem, sample, turn) -> token ids."""
    records = [one for one in read_lines(run / "responses.jsonl") if one["step"] == step]
    return {(one["problem_id"], one["sample_index"], one.get("turn", 0)): one["token_ids"] for one in records}


def test_episodes_have_different_lengths(runs, of):
    whole = runs(*of("default"))
    assert {turn for _, _, turn in turns_of(whole, step=0)} == {0, 1, 2}
    for step in reproducible_metrics(whole):
        assert step["gradient_norm"] > 0 and "rewards/mean" in step
        assert 1 < step["episodes/turns_mean"] < 3 and step["episodes/reward_mean"] > 0
        assert step["rewards/trained_share"] == 1.0


@pytest.mark.full
def test_an_environment_with_a_state_gives_the_run_of_the_same_function(runs, of):
    with_state = runs(*of("default", "environment.name=sessions.Session"))
    assert reproducible_metrics(with_state) == reproducible_metrics(runs(*of("default")))


def test_an_episode_of_one_sequence_trains_as_its_turns_do_and_reads_fewer_tokens(ranks, runs, of, tmp_path):
    """The other run has the same prompts and responses, and reads each turn by itself."""
    joined, by_turn = runs(*of("one_sequence")), tmp_path / "run"
    replay = f"tests.replay={joined}/responses.jsonl"
    train(ranks, runs.arguments(by_turn, *of("one_sequence", replay)), start=start_turn_by_turn)
    assert_steps_equal(joined, by_turn, (*COMPARED, "loss", "student_nll", "reverse_kl"))
    for one, each in zip(reproducible_metrics(joined), reproducible_metrics(by_turn), strict=True):
        assert one["episodes/turns_mean"] > 1 and one["tokens/read"] < 0.8 * each["tokens/read"]
        assert one["rollout/kept_tokens"] > 0


@pytest.mark.full
@combinations(recipe=["rltf_sd", "rltf_fm"])
def test_further_texts_of_episodes_are_trained_on(runs, of, recipe):
    whole = runs(*of(recipe))
    for number, step in enumerate(reproducible_metrics(whole)):
        assert step["gradient_norm"] > 0 and step["terms/divergence_mean"] == 0
        seconds = [tokens for (_, _, turn), tokens in turns_of(whole, number).items() if turn == 1]
        more = sum(map(len, seconds)) if recipe == "rltf_sd" else 3 * len(seconds)  # X, the number, the stop token
        assert seconds and step["tokens/response"] == step["tokens/rollout"] + more
        assert ("episodes/replies_trained_share" in step) == (recipe == "rltf_fm")
        assert step["sampler/log_prob_max_abs_diff"] < 1e-4, "only responses are compared with the sampler"


@pytest.mark.full
def test_a_run_that_is_killed_within_an_episode_plays_the_step_again(ranks, runs, of, tmp_path):
    killed = runs.arguments(tmp_path / "run", *of("one_sequence"))
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, killed, start=start_and_die_in_a_second_turn)
    assert saved_step(tmp_path / "run") == 1
    train(ranks, killed)
    assert_equal_runs(ranks, runs(*of("one_sequence")), tmp_path / "run", 2)


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_with_episodes_resumes_bit_for_bit(runs, of, recipe):
    runs.resumed(*of(recipe), step=1)


@pytest.mark.full
@pytest.mark.parametrize("layout", TWO_RANKS)
@pytest.mark.parametrize("recipe", ["default", "sessions", "one_sequence"])
def test_layouts_sample_the_same_episodes_whose_terms_are_equal(runs, of, recipe, layout):
    one, other = runs(*of(recipe)), runs(*of(recipe, *TWO_RANKS[layout]), world_size=2)
    assert turns_of(other, step=0) == turns_of(one, step=0)
    assert_steps_equal(one, other, COMPARED, num_steps=1)


@pytest.mark.full
@pytest.mark.parametrize(("recipe", "layout"), LAYOUTS_OF_RECORDED)
def test_the_terms_of_recorded_episodes_are_equal_in_every_layout(runs, of, recipe, layout):
    one, other = runs(*of(recipe)), runs.replayed(*of(recipe), more=TWO_RANKS[layout])
    assert all({"episodes/turns_mean", "terms/policy_mean"} <= set(line) for line in reproducible_metrics(one))
    assert_steps_equal(one, other, COMPARED)


TURN = ("episode", "turn", "reward", "hint", "reply")
SHOWN = {
    "by_turn": [*DEFAULT, "environment.name=sessions.Guiding", TURNS],
    "one_sequence": [*DEFAULT, REPLYING, TURNS, ONE_SEQUENCE],
}


@pytest.fixture(scope="module")
def showing(data, early) -> Callable[..., list[str]]:
    """Return a function to the options of a run of one step with an evaluation, which shows three problems."""
    more = ["num_steps=1", "metrics.show_samples=3", "metrics.explore_samples=3", "report.every=1"]
    more += ["evaluation.verifier=exact_match", "evaluation.every=1", f"evaluation.path={data}/problems.jsonl"]
    more += ["evaluation.limit=2"]
    return lambda name, *others: [early, *TINY, *more, *SHOWN[name], *others]


def assert_says_what_belongs_to_its_turn(record: dict[str, Any], data: Path, name: str) -> None:
    """Compare the record of a turn with the replies of `Replying`, and its hint with those of `Guiding`."""
    solutions = {problem["id"]: problem["solution"] for problem in read_lines(data / "problems.jsonl")}
    said = response_text(Response.unsampled(record["tokens"]["id"]), load_tokenizer(data / "tokenizer"))
    is_even, number = sum(map(ord, said)) % 2 == 0, record["turn"]
    assert record["reward"] == (0.0 if record["truncated"] else float(is_even))
    assert record["reply"] == (None if record["truncated"] else f"X{number + 1}")
    is_guided = name == "by_turn" and number > 0
    assert record["hint"] == (str(number) if is_guided else solutions[record["problem_id"]])


@pytest.mark.parametrize("name", ["by_turn", pytest.param("one_sequence", marks=pytest.mark.full)])
def test_samples_report_and_explorer_have_the_turns_of_an_episode_with_what_belongs_to_each(runs, data, showing, name):
    run = runs(*showing(name))
    samples = read_samples(run)
    grouped = itertools.groupby(samples, key=lambda one: (one["problem_id"], one["episode"]))
    episodes = [[turn["turn"] for turn in turns] for _, turns in grouped]
    assert len(episodes) == 3 and any(len(turns) > 1 for turns in episodes)
    assert episodes == [[*range(len(turns))] for turns in episodes]
    for record in samples:
        assert_says_what_belongs_to_its_turn(record, data, name)

    blocks = blocks_of((run / "report.html").read_text())
    (shown,) = blocks["samples"]
    for one, sample in zip(shown, samples, strict=True):
        assert [one[key] for key in TURN] == [sample[key] for key in TURN]
        assert [text for text, *_ in one["tokens"]] == sample["tokens"]["text"]
        assert any(difference is not None for _, difference, *_ in one["tokens"])

    explored = [read_explored(path) for path in explored_files(run)]
    assert len(explored) == 3 and any(record["turn"] for record in explored)
    for record, sample in zip(explored, samples[:3], strict=True):
        assert {key: record[key] for key in (*TURN, "prompt")} == {key: sample[key] for key in (*TURN, "prompt")}
        assert record["tokens"]["loss"] == pytest.approx(sample["tokens"]["loss"], rel=2e-4, abs=2e-6)
    (links,) = blocks["overview"]["explored"]
    assert [link["turn"] for link in links] == [record["turn"] + 1 for record in explored]


@pytest.mark.full
@pytest.mark.parametrize("name", SHOWN)
def test_turns_that_move_between_replicas_take_along_what_belongs_to_them(runs, data, showing, name):
    records = read_samples(runs(*showing(name), world_size=2))
    assert any(record["turn"] for record in records)
    for record in records:
        assert_says_what_belongs_to_its_turn(record, data, name)
