# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose hints are written on the way: by functions, from a bank of skills, and from the next messages of logs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_resumes_equal,
    assert_steps_equal,
    overrides,
    reproducible_metrics,
    train,
    write_conversations,
)

FUNCTIONS = "hint_functions"
VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
ON_POLICY = ["data.global_batch_size=4", "rollout.num_samples=4", "rollout.max_new_tokens=10", VERIFIED]
TRUNCATED = "data.on_long_context=truncate_end"
LOGGED = ["data.global_batch_size=6", "rollout.max_new_tokens=10"]
RUNS = {
    "function": ["recipe=opsd_rl", *ON_POLICY, "method.name=sdpo", f"method.hints={FUNCTIONS}.first_right_text"],
    "selection": ["recipe=opsd", *ON_POLICY, f"method.select={FUNCTIONS}.without_last_character"],
    "sdpo_feedback": ["recipe=sdpo_feedback", *ON_POLICY, "environment.name=replying.Replying"],
    "skill_sd": ["recipe=skill_sd", *ON_POLICY, "method.keep=2", f"method.summarizer={FUNCTIONS}.skill_of"],
    "openclaw": [
        "recipe=openclaw",
        *LOGGED,
        f"method.judge={FUNCTIONS}.hint_of",
        "method.min_length=3",
        f"method.reward={FUNCTIONS}.reward_of_reply",
    ],
    "full": [
        "recipe=openclaw",
        *LOGGED,
        f"method.judge={FUNCTIONS}.hint_of",
        "method.min_length=3",
        "method.weight=0",
        "method.signal=full",
    ],
    "asked": ["recipe=openclaw", *LOGGED, "method.judge_template='{role}{response}{next_state}'"],
}
LAYOUTS_OF = {"function": ["PP2"], "skill_sd": ["DP2", "TP2"], "openclaw": ["DP2", "CP2"], "full": ["PP2"]}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def logs(own_data) -> Path:
    """Return ``own_data`` with 30 conversations of two assistant turns, a correction and thanks."""
    from _lib import subtraction

    chats = [
        (subtraction.problem_text(a, b), f"{number:03d};", "X", subtraction.answer(a, b), "thanks")
        for number, (a, b) in enumerate(subtraction.distinct(30, "train", seed=1))
    ]
    write_conversations(own_data, [*chats, chats[0][:2]], "hindsight.jsonl")
    return own_data


def arguments(data: Path, run_dir: Path, name: str, *more: str) -> list[str]:
    options = ["data.teacher_template='{problem}H{solution}|'", TRUNCATED, "optimizer.lr_warmup_steps=0"]
    if RUNS[name][0] == "recipe=openclaw":
        options += [f"data.path={data}/hindsight.jsonl", f"data.chat_template={data}/template.jinja"]
    options += [f"num_steps={NUM_STEPS}", "checkpoint.save_every=2"]
    recipe, *own = RUNS[name]
    return [recipe, *overrides(data, run_dir, *options, *own), *more]


@pytest.fixture(scope="module")
def run_of(ranks, logs, start, tmp_path_factory):
    """Return a function that returns the directory of a finished run on one rank."""

    @functools.cache
    def finished(name: str) -> Path:
        run = tmp_path_factory.mktemp(name) / "run"
        record = [] if RUNS[name][0] == "recipe=openclaw" else [f"tests.record={run}/responses.jsonl"]
        train(ranks, arguments(logs, run, name, start, *record))
        return run

    return finished


@combinations(name=list(RUNS), quick={"name": ["skill_sd"]}, strength=1)
def test_a_run_trains_and_resumes_bit_for_bit(ranks, logs, start, run_of, name):
    whole = run_of(name)
    lines = reproducible_metrics(whole)
    assert len(lines) == NUM_STEPS
    for line in lines:
        assert line["gradient_norm"] > 0 or (name == "asked" and line["rewards/mean"] == 0)
        assert ("hints/share" in line) == (name != "selection")
        assert ("terms/policy_mean" in line) == (name not in ("selection", "full", "sdpo_feedback"))
    if name == "skill_sd":
        counts = [line["skills/count"] for line in lines]
        assert counts == sorted(counts) and counts[0] == 0 < counts[1] <= counts[-1]
        assert lines[0]["hints/share"] == 0
    if name == "sdpo_feedback":
        assert all(line["hints/share"] == line["rewards/trained_share"] for line in lines)
    if name in ("function", "openclaw", "full"):
        assert all(0 < line["hints/share"] < 1 for line in lines)
    if name == "openclaw":
        assert all(line["rewards/trained_share"] == 1 for line in lines)
        assert all(line["rewards/mean"] == pytest.approx(1 - 2 * line["hints/share"]) for line in lines)
        assert all(line["terms/clipped_share"] == 0 for line in lines), "the ratio of logged replies is 1"
    if name == "full":
        assert all(line["turns/count"] == pytest.approx(6 * line["hints/share"]) for line in lines)
    assert_resumes_equal(ranks, whole, lambda run: arguments(logs, run, name, start), step=2, num_steps=NUM_STEPS)


@combinations(
    name=list(LAYOUTS_OF),
    layout=list(TWO_RANKS),
    quick={"name": ["skill_sd"], "layout": ["DP2"]},
    strength=1,
    valid=lambda name, layout: layout in LAYOUTS_OF[name],
)
def test_hints_and_terms_are_equal_in_every_layout(ranks, logs, start, run_of, tmp_path, name, layout):
    one = run_of(name)
    is_logged = RUNS[name][0] == "recipe=openclaw"
    replay = [] if is_logged else [f"tests.replay={one}/responses.jsonl"]
    train(ranks, arguments(logs, tmp_path / "run", name, start, *replay, *TWO_RANKS[layout]), 2)
    assert_steps_equal(one, tmp_path / "run", ("terms/", "rewards/", "hints/", "skills/", "loss/"))
