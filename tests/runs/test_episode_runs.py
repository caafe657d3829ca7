# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with an environment: resumed, replayed, and with equal texts and terms in every layout."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import RankError
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_equal_runs,
    assert_resumes_equal,
    assert_steps_equal,
    overrides,
    reproducible_metrics,
    saved_step,
    start_with,
    train,
)

ENVIRONMENT = ["environment.name=replying.Replying", "environment.max_turns=3"]
RECIPES = {
    "default": ["method.name=opsd_rl", *ENVIRONMENT],
    "rltf_sd": [ENVIRONMENT[0], "method.revision_min_log_prob=null"],
    "rltf_fm": [ENVIRONMENT[0], "method.reply_template='{problem}{response}'"],
    "sessions": ["method.name=opsd_rl", "environment.name=sessions.Opened", "environment.max_turns=3"],
    "one_sequence": ["method.name=opsd_rl", *ENVIRONMENT, "environment.limits={one_sequence: true}"],
}
BASES = {"sessions": "default", "one_sequence": "default"}
"""Name of a run -> the recipe, where it has another name."""
LAYOUTS_OF_RECORDED = {"rltf_sd": ["TP2", "DP2"], "rltf_fm": ["PP2", "CP2"]}
COMPARED = ("terms/", "rewards/", "episodes/", "loss/")
NUM_STEPS = 2


def arguments(data: Path, run_dir: Path, recipe: str, *more: str) -> list[str]:
    """Return the arguments of a short run of ``recipe``, whose episodes have different numbers of turns."""
    tiny = overrides(data, run_dir, "data.global_batch_size=4", "rollout.num_samples=2", "rollout.max_new_tokens=10")
    tiny += ["data.on_long_context=drop", "optimizer.lr_warmup_steps=0", f"num_steps={NUM_STEPS}"]
    return [f"recipe={BASES.get(recipe, recipe)}", *tiny, "checkpoint.save_every=1", *RECIPES[recipe], *more]


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


def turns_of(path: Path, step: int) -> dict[tuple[str, int, int], list[int]]:
    """Return the recorded responses of a step: (problem, sample, turn) -> token ids."""
    records = map(json.loads, path.read_text().splitlines())
    return {
        (r["problem_id"], r["sample_index"], r.get("turn", 0)): r["token_ids"] for r in records if r["step"] == step
    }


@pytest.fixture(scope="module")
def run_of(ranks, data, early, tmp_path_factory):
    """Return a function that returns the directory of the finished run of a recipe on one rank."""

    @functools.cache
    def finished(recipe: str) -> Path:
        run = tmp_path_factory.mktemp(recipe) / "run"
        train(ranks, arguments(data, run, recipe, early, f"tests.record={run}/responses.jsonl"))
        return run

    return finished


def test_episodes_have_different_lengths_and_train(run_of):
    whole = run_of("default")
    assert {turn for _, _, turn in turns_of(whole / "responses.jsonl", step=0)} == {0, 1, 2}
    for step in reproducible_metrics(whole):
        assert step["gradient_norm"] > 0 and "rewards/mean" in step
        assert 1 < step["episodes/turns_mean"] < 3 and step["episodes/reward_mean"] > 0
        assert step["rewards/trained_share"] == 1.0


def test_an_episode_of_one_sequence_trains_as_its_turns_do_and_reads_fewer_tokens(ranks, data, early, run_of, tmp_path):
    """The other run has the same prompts and responses, and reads each turn by itself."""
    joined, by_turn = run_of("one_sequence"), tmp_path / "run"
    replay = arguments(data, by_turn, "one_sequence", early, f"tests.replay={joined}/responses.jsonl")
    train(ranks, replay, start=start_turn_by_turn)
    assert_steps_equal(joined, by_turn, (*COMPARED, "loss", "student_nll", "reverse_kl"))
    assert all(step["rollout/kept_tokens"] > 0 for step in reproducible_metrics(joined))
    for one, each in zip(reproducible_metrics(joined), reproducible_metrics(by_turn), strict=True):
        assert one["episodes/turns_mean"] > 1 and one["tokens/read"] < 0.8 * each["tokens/read"]


@combinations(recipe=["rltf_sd", "rltf_fm"], quick={"recipe": ["rltf_sd"]}, strength=1)
def test_further_texts_of_episodes_are_trained_on(run_of, recipe):
    whole = run_of(recipe)
    for number, step in enumerate(reproducible_metrics(whole)):
        assert step["gradient_norm"] > 0 and step["terms/divergence_mean"] == 0
        responses = turns_of(whole / "responses.jsonl", number)
        seconds = [tokens for (_, _, turn), tokens in responses.items() if turn == 1]
        more = sum(map(len, seconds)) if recipe == "rltf_sd" else 3 * len(seconds)  # X, the number, the stop token
        assert seconds and step["tokens/response"] == step["tokens/rollout"] + more
        assert ("episodes/replies_trained_share" in step) == (recipe == "rltf_fm")
        assert step["sampler/log_prob_max_abs_diff"] < 1e-4, "only responses are compared with the sampler"


@pytest.mark.full
def test_a_run_that_is_killed_within_an_episode_plays_the_step_again(ranks, data, early, run_of, tmp_path):
    whole, killed = run_of("one_sequence"), arguments(data, tmp_path / "run", "one_sequence", early)
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, killed, start=start_and_die_in_a_second_turn)
    assert saved_step(tmp_path / "run") == 1
    train(ranks, killed)
    assert_equal_runs(ranks, whole, tmp_path / "run", NUM_STEPS)


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_with_episodes_resumes_bit_for_bit(ranks, data, early, run_of, recipe):
    whole = run_of(recipe)
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, recipe, early), step=1, num_steps=NUM_STEPS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [(recipe, one) for recipe in ("default", "sessions", "one_sequence") for one in TWO_RANKS],
)
def test_layouts_sample_the_same_episodes_whose_terms_are_equal(ranks, data, early, run_of, tmp_path, recipe, layout):
    run, record = tmp_path / "run", tmp_path / "responses.jsonl"
    one = run_of(recipe)
    train(ranks, arguments(data, run, recipe, early, f"tests.record={record}", *TWO_RANKS[layout]), 2)
    assert turns_of(record, step=0) == turns_of(one / "responses.jsonl", step=0)
    assert_steps_equal(one, run, COMPARED, num_steps=1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "layout"), [(recipe, layout) for recipe, found in LAYOUTS_OF_RECORDED.items() for layout in found]
)
def test_the_terms_of_recorded_episodes_are_equal_in_every_layout(ranks, data, early, run_of, tmp_path, recipe, layout):
    one = run_of(recipe)
    replay = f"tests.replay={one}/responses.jsonl"
    train(ranks, arguments(data, tmp_path / "run", recipe, early, replay, *TWO_RANKS[layout]), 2)
    assert all({"episodes/turns_mean", "terms/policy_mean"} <= set(line) for line in reproducible_metrics(one))
    assert_steps_equal(one, tmp_path / "run", COMPARED)


def test_an_environment_with_a_state_gives_the_run_of_the_same_function(ranks, data, early, run_of, tmp_path):
    train(ranks, arguments(data, tmp_path / "run", "default", early, "environment.name=sessions.Session"))
    assert reproducible_metrics(tmp_path / "run") == reproducible_metrics(run_of("default"))


@pytest.mark.full
def test_the_first_prompt_of_a_session_shows_its_text(run_of):
    one = run_of("sessions")
    records = [json.loads(line) for line in (one / "responses.jsonl").read_text().splitlines()]
    shown = {record["opening"]["text"] for record in records if record.get("turn", 0) == 0}
    assert len(shown) > 3 and not any("opening" in record for record in records if record.get("turn", 0))


@pytest.mark.full
def test_sessions_that_fail_cost_their_episodes_alone(ranks, data, early, tmp_path):
    run, record = tmp_path / "run", tmp_path / "responses.jsonl"
    failing = ["environment.name=sessions.Failing", f"tests.record={record}", "environment.limits.seconds=2"]
    train(ranks, arguments(data, run, "sessions", early, *failing))
    replies = [json.loads(line).get("reply", {}) for line in record.read_text().splitlines()]
    reasons = {reply["failure"] for reply in replies if "failure" in reply}
    first_lines = {reason.splitlines()[0] for reason in reasons}
    assert first_lines == {"step raised ValueError: odd", "the process of the session ended in step: status 3"}
    assert any(reply.get("reward") == 1 for reply in replies)
    for step in reproducible_metrics(run):
        assert 0 < step["episodes/failed_share"] < 1 and step["gradient_norm"] > 0


@pytest.mark.full
def test_a_run_ends_if_no_session_can_begin(ranks, data, early, tmp_path):
    train(
        ranks, arguments(data, tmp_path / "run", "sessions", early, "environment.name=sessions.NeverBegun"), expected=4
    )
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "all 8 sessions of the step failed, the first: reset raised OSError: no display" in events
