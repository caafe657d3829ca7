# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose steps train on the responses that are finished first, and continue the others in the next step."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from served_runs import metrics_of
from tiny_run import (
    assert_resumes_equal,
    assert_steps_equal,
    go_back_to_step,
    overrides,
    refusal,
    reproducible_metrics,
    start_and_listen,
    train,
)

BATCH, EXTRA = 8, 8
PARTIAL = [
    f"rollout.extra_problems={EXTRA}",
    "rollout.max_staleness=2",
    "rollout.max_new_tokens=28",
    "rollout.round_tokens=4",
]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory) -> Path:
    """Return the directory of a run of six steps with partial responses, which records its responses."""
    root = tmp_path_factory.mktemp("partial")
    train(ranks, overrides(data, root / "run", *PARTIAL, f"rollout.record={root}/record.jsonl"))
    return root


def test_every_step_trains_on_as_many_problems_and_none_is_dropped_or_trained_on_twice(whole):
    by_problem: dict[str, Counter[tuple[int, int]]] = {}
    for record in records(whole / "record.jsonl"):
        by_problem.setdefault(record["problem_id"], Counter())[record["step"], record["sample_index"]] += 1
    assert sum(len(samples) for samples in by_problem.values()) == 6 * BATCH
    assert all(count == 1 for samples in by_problem.values() for count in samples.values())
    steps = metrics_of(whole / "run")
    assert [step["response/length_mean"] > 0 for step in steps] == [True] * 6
    # 40 problems are an epoch: those of the first four steps come once, whatever step trains on them.
    first = {problem for problem, samples in by_problem.items() if min(step for step, _ in samples) == 0}
    assert len(first) == BATCH + EXTRA


def test_long_responses_go_on_and_are_never_older_than_allowed(whole):
    steps = metrics_of(whole / "run")
    assert steps[0]["rollout/carried_responses"] > 0 and steps[0]["rollout/staleness_max"] == 0
    assert any(step["rollout/mixed_share"] > 0 for step in steps[1:])
    assert all(step["rollout/staleness_max"] <= 2 for step in steps)
    assert any(0 < step["rollout/staleness_mean"] < 2 for step in steps)
    assert steps[-1]["rollout/carried_responses"] == 0, "the last steps begin nothing that no step would train on"
    # The first step stops before its longest responses are finished: 28 tokens are 7 rounds.
    assert min(step["rollout/rounds"] for step in steps) < 7
    for record in records(whole / "record.jsonl"):
        lengths = [count for _, count in record["weight_spans"]]
        assert sum(lengths) in (0, len(record["token_ids"]))
        assert len(record["token_ids"]) == len(record["log_probs"]) == len(record["sampled_log_probs"])


def test_a_resumed_run_repeats_every_bit_of_the_responses_under_way(ranks, whole, data):
    assert_resumes_equal(ranks, whole / "run", lambda run_dir: overrides(data, run_dir, *PARTIAL), step=3, num_steps=6)


def test_without_learning_the_responses_are_those_of_whole_generations(ranks, data, tmp_path):
    """A response depends on its seed alone, however many rounds and steps it takes."""
    still = ["optimizer.lr=0", "optimizer.min_lr=0", "num_steps=3"]
    for name, more in {"whole": ["rollout.max_new_tokens=28"], "partial": PARTIAL}.items():
        more = [*more, "rollout.num_samples=2"]
        recorded = [f"rollout.record={tmp_path}/{name}.jsonl", "checkpoint.save_every=0"]
        train(ranks, overrides(data, tmp_path / name, *more, *still, *recorded))
    expected, found = (
        {(r["step"], r["problem_id"], r["sample_index"]): r for r in records(tmp_path / f"{name}.jsonl")}
        for name in ("whole", "partial")
    )
    common = expected.keys() & found.keys()
    assert len(common) >= 2 * BATCH
    for key in common:
        assert found[key]["token_ids"] == expected[key]["token_ids"], key
        assert found[key]["finish_reason"] == expected[key]["finish_reason"]
        assert found[key]["log_probs"] == pytest.approx(expected[key]["log_probs"], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ([], 2),
        (["parallel.tensor_model_parallel_size=2"], 2),
        (["parallel.pipeline_model_parallel_size=2"], 2),
        (["parallel.context_parallel_size=2"], 2),
    ],
    ids=["DP2", "TP2", "PP2", "CP2"],
)
def test_in_any_layout_every_replica_has_its_share_of_finished_problems(
    ranks, whole, data, tmp_path, layout, world_size
):
    train(ranks, overrides(data, tmp_path / "run", *PARTIAL, *layout), world_size)
    if "context" in str(layout):  # the other layouts begin with other weights
        assert_steps_equal(whole / "run", tmp_path / "run", ("loss/", "tokens/", "rollout/"), 3)
    for step in metrics_of(tmp_path / "run"):
        assert step["rollout/staleness_max"] <= 2 and step["tokens/rollout"] > 0


@pytest.mark.full
def test_a_run_with_other_lengths_begins_responses_under_way_anew(ranks, data, tmp_path):
    arguments = overrides(
        data, tmp_path / "run", *PARTIAL, "checkpoint.save_every=1", "checkpoint.keep_last=4", "num_steps=4"
    )
    train(ranks, arguments)
    go_back_to_step(1, tmp_path / "run")
    train(ranks, [*arguments, "rollout.round_tokens=14"])
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 4 and all(step["rollout/rounds"] <= 2 for step in steps[1:])


def test_a_run_that_no_longer_continues_responses_warns_of_the_problems_that_wait(ranks, whole, data, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    go_back_to_step(3, tmp_path / "run")
    carried = metrics_of(tmp_path / "run")[2]["rollout/carried_responses"]
    assert carried > 0
    arguments = overrides(data, tmp_path / "run", "rollout.max_new_tokens=28", "num_steps=4")
    ((status, output),) = ranks.run(start_and_listen, arguments, world_size=1, init_process_group=False)
    assert status == 0, output
    warned = re.search(r"holds (\d+) problems whose responses are under way: with rollout.extra_problems=0", output)
    assert warned is not None and int(warned[1]) >= carried


REFUSED: dict[str, tuple[list[str], str]] = {
    "servers": (
        ["rollout.engine=vllm", "rollout.placement=server", "rollout.num_servers=1"],
        "rollout.extra_problems=8 is for an engine on the trainer's own devices",
    ),
    "responses that may not be old": (["rollout.max_staleness=0"], "needs rollout.max_staleness of at least 1"),
    "rounds that do not end together": (["rollout.round_tokens=5"], "must divide rollout.max_new_tokens=28"),
    "own solutions": (["method.name=own_solutions"], "method.name=own_solutions needs all responses of a step"),
    "guidance": (["rollout.guidance=mixed"], "rollout.guidance=mixed needs all responses of a step"),
    "a replay": (["rollout.replay=some.jsonl"], "this run samples none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused(ranks, data, tmp_path, name):
    more, message = REFUSED[name]
    assert message in refusal(ranks, overrides(data, tmp_path / "run", *PARTIAL, *more))


def test_metrics_have_the_same_keys_in_every_step(whole):
    keys = [set(line) for line in reproducible_metrics(whole / "run")]
    assert all({"rollout/rounds", "rollout/carried_responses"} <= line for line in keys)
