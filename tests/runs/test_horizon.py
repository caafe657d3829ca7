# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs that train on the beginnings of responses (rollout.horizon), and evaluate on whole responses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_run import TWO_RANKS, assert_steps_equal, reproducible_metrics, start_and_listen

LENGTH, FIRST, LAST, STEPS = 14, 3, 6, 2
RAMP = (f"rollout.horizon=[{FIRST},{LAST},{STEPS}]", "num_steps=3", "checkpoint.save_every=1", "seed=3")
HORIZONS = [3, 4, 6]


def responses(run_dir: Path) -> list[list[dict]]:
    """Return the recorded responses of each step."""
    records = [json.loads(line) for line in (run_dir / "responses.jsonl").read_text().splitlines()]
    return [[one for one in records if one["step"] == step] for step in range(len(HORIZONS))]


def test_training_reads_the_beginnings_of_the_responses_and_evaluations_read_all(runs, start, data):
    evaluated = [f"evaluation.path={data}/problems.jsonl", "evaluation.every=3", "evaluation.num_samples=0"]
    run, whole = runs(start, *RAMP, *evaluated), runs(start, "seed=3", "num_steps=1")
    *steps, evaluation = reproducible_metrics(run)
    assert [step["rollout/horizon"] for step in steps] == HORIZONS
    for metrics, horizon, sampled in zip(steps, HORIZONS, responses(run), strict=True):
        assert max(len(one["token_ids"]) for one in sampled) == horizon == metrics["response/length_max"]
        ends = [one["finish_reason"] for one in sampled]
        assert set(ends) <= {"stop", "horizon"} and "response/truncated_share" not in metrics
        assert metrics["response/unfinished_share"] == ends.count("horizon") / len(ends) > 0
        assert metrics["tokens/response"] == sum(len(one["token_ids"]) for one in sampled)
    first, uncut = (responses(it)[0] for it in (run, whole))
    assert [one["token_ids"] for one in first] == [one["token_ids"][:FIRST] for one in uncut], "the same responses"
    assert LAST < evaluation["evaluation/greedy_mean_length"] <= LENGTH


def test_a_horizon_grows_on_as_if_the_run_had_never_stopped(runs, start):
    runs.resumed(start, *RAMP, step=2)


LONG = 40
AUTO = (f"rollout.max_new_tokens={LONG}", "method.token_weights=reach", "method.reach_exponent=1000")
AUTO = (*AUTO, "rollout.horizon=auto", "target=teacher_alone", *RAMP[1:])


def test_a_horizon_by_itself_follows_the_weights_of_the_steps_before_and_resumes_and_is_printed(ranks, runs, start):
    steps = reproducible_metrics(runs(start, *AUTO))
    positions = [int(step["weights/position_95"]) for step in steps]
    following = [min(LONG, max(8, 2 * max(positions[: i + 1]))) for i in range(len(steps))]
    assert [step["rollout/next_horizon"] for step in steps] == following and min(following[:2]) < LONG, positions
    horizons = [LONG, *following[:-1]]
    assert [step["rollout/horizon"] for step in steps] == [step["response/length_max"] for step in steps] == horizons
    copy = runs.continued(start, *AUTO, step=2)
    assert reproducible_metrics(copy) == steps
    arguments = runs.arguments(copy.parent / "printed", start, *AUTO, "metrics.console_every=1")
    [(status, output)] = ranks.run(start_and_listen, arguments, world_size=1, init_process_group=False)
    changes = sum(one != other for one, other in pairwise([*horizons, following[-1]]))
    assert status == 0 and output.count("rollout.horizon=auto: ") == changes > 0


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_all_ranks_of_a_layout_choose_the_same_horizon(runs, start, layout):
    more = TWO_RANKS[layout]
    assert_steps_equal(
        runs(start, *AUTO), runs.replayed(start, *AUTO, more=more), ("rollout/", "weights/position_95", "response/")
    )


@pytest.mark.parametrize("layout", ["TP2", pytest.param("DP2", marks=pytest.mark.full)])
def test_a_horizon_is_the_same_in_every_layout(runs, start, layout):
    replicated = runs(start, *RAMP, *TWO_RANKS[layout], world_size=2)
    assert_steps_equal(runs(start, *RAMP), replicated, ("rollout/horizon", "tokens/", "response/", "loss/"), 1)
    assert [step["rollout/horizon"] for step in reproducible_metrics(replicated)] == HORIZONS
    assert_steps_equal(runs(start, *RAMP), runs.replayed(start, *RAMP, more=TWO_RANKS[layout]), ("loss/", "response/"))
