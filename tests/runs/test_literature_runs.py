# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the literature as whole runs: on one rank, resumed, and equal in other layouts."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
from tiers import combinations
from tiny_run import TWO_RANKS, assert_resumes_equal, assert_steps_equal, overrides, reproducible_metrics, train

VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
REWARDED = {"grpo", "sdpo", "opsd_rl", "pi_distill", "scope", "uni_opd", "rlcsd", "rlt", "sod", "ovd", "past", "skald"}
WITH_POLICY_TERM = REWARDED - {"sdpo"} | {"beta_opsd", "opsa", "tip"}
REPLICATED = {"grpo", "scope", "uni_opd", "rlcsd", "sod", "ovd", "tip", "dapd", "past", "skald"}
RECIPES = sorted(
    {"beta_opsd", "dapd", "eopd", "opsa", "pw_opsd", "sdft", "opsd", "rft", "sr_opsd", "tip", "u_opsd", "veto"}
    | REWARDED
)
LAYOUT_OF = dict(zip(RECIPES, itertools.cycle(["CP2", "PP2", "TP2"]), strict=False))
"""A layout for every recipe.  The recipes of `REPLICATED` run with replicas, too."""
NUM_STEPS = 2
OWN = {
    "beta_opsd": ["method.signal=advantage", "method.discount=0.9"],
    "rlcsd": ["rollout.max_new_tokens=24"],  # enough that most responses end, and can be hints
    "eopd": ["method.threshold=2.47"],  # an untrained teacher's entropies lie on both sides
    "rlt": ["method.closing_tag=-"],  # a character that an untrained model writes now and then
    "u_opsd": ["method.threshold=0.2"],  # one response that ends is a majority of the others, which do not
    "sod": ["environment.name=replying.Replying", "environment.max_turns=3"],
    "past": ["method.hint_template='{attempt}|{solution}'", "method.teacher_steps=1"],  # both kinds of steps
    "skald": ["method.num_hinted=3"],
    "ovd": ["method.template='{problem}{response}|'", "method.step_separator=','"],
}
COMPARED = tuple("terms/ rewards/ hints/ loss/ correction/ explanations/ episodes/ verbal/ skills/ retries/".split())


def arguments(data: Path, run_dir: Path, recipe: str, *more: str) -> list[str]:
    """Return the arguments of a short run of ``recipe`` on problems that an untrained model sometimes solves."""
    tiny = overrides(data, run_dir, "data.global_batch_size=4", "rollout.num_samples=4", "rollout.max_new_tokens=10")
    tiny += ["data.on_long_context=drop", "rollout.temperature=1", VERIFIED, "optimizer.lr_warmup_steps=0"]
    tiny += OWN.get(recipe, [])
    return [f"recipe={recipe}", *tiny, f"num_steps={NUM_STEPS}", "checkpoint.save_every=1", *more]


@pytest.fixture(scope="module")
def run_of(ranks, data, start, tmp_path_factory):
    """Return a function that returns the directory of the finished run of a recipe on one rank."""

    @functools.cache
    def finished(recipe: str) -> Path:
        run = tmp_path_factory.mktemp(recipe) / "run"
        train(ranks, arguments(data, run, recipe, start, f"tests.record={run}/responses.jsonl"))
        return run

    return finished


@combinations(recipe=RECIPES, quick={"recipe": ["rlcsd"]}, strength=1)
def test_a_recipe_trains_and_resumes_bit_for_bit(ranks, data, start, run_of, recipe):
    whole = run_of(recipe)
    for step in reproducible_metrics(whole):
        assert step["gradient_norm"] > 0
        assert ("terms/policy_mean" in step) == (recipe in WITH_POLICY_TERM)
        assert ("rewards/mean" in step) == (recipe in REWARDED | {"rft"})
        assert step.get("episodes/turns_mean", 1) > 1 or recipe != "sod"
    if recipe == "ovd":
        assert max(step["verbal/replaced"] for step in reproducible_metrics(whole)) > 0
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, recipe, start), step=1, num_steps=NUM_STEPS)


@pytest.mark.full
@combinations(
    recipe=RECIPES,
    layout=list(TWO_RANKS),
    valid=lambda recipe, layout: layout == LAYOUT_OF[recipe] or (layout == "DP2" and recipe in REPLICATED),
)
def test_the_terms_of_a_recipe_are_equal_in_every_layout(ranks, data, start, run_of, tmp_path, recipe, layout):
    one = run_of(recipe)
    replay = f"tests.replay={one}/responses.jsonl"
    train(ranks, arguments(data, tmp_path / "run", recipe, start, replay, *TWO_RANKS[layout]), 2)
    assert_steps_equal(one, tmp_path / "run", COMPARED)


@pytest.mark.full
def test_responses_that_state_their_confidence_train_and_resume_bit_for_bit(ranks, data, tmp_path):
    from _lib import subtraction
    from _lib.pretraining import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer", subtraction.TASK.alphabet + "CNfidencTheomprcalqusxv.:' \n")
    options = [f"data.tokenizer={tmp_path}/tokenizer", "data.student_template='{problem}'", "schedule.max_tokens=1024"]
    options += ["rollout.max_new_tokens=64", "model.max_position_embeddings=512"]
    whole = tmp_path / "run"
    train(ranks, arguments(data, whole, "caopd", *options))
    for step in reproducible_metrics(whole):
        assert step["gradient_norm"] > 0 and 0 < step["rewards/trained_share"] < 1
        assert "sampler/log_prob_mean_abs_diff" not in step, "the sampler knows nothing of the edited texts"
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, "caopd", *options), step=1, num_steps=NUM_STEPS)
