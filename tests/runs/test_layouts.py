# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The steps of a whole run are the same steps in every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from tiers import combinations
from tiny_run import TWO_RANKS, overrides, recorded, reproducible_metrics, train

LAYOUTS = TWO_RANKS | {
    "PP2xVPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
}
FOUR_LAYERS = "model.num_layers=4"  # for the four chunks of PP2xVPP2


NUM_STEPS = [
    pytest.param("PP2xVPP2", 3, id="PP2xVPP2, 3 steps"),
    *(pytest.param(name, 8, id=f"{name}, 8 steps", marks=pytest.mark.full) for name in LAYOUTS),
]


@pytest.fixture(scope="module")
def base(ranks, data, tmp_path_factory) -> Path:
    """Return the directory of a run of one step, with whose weights the runs of all layouts start."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(ranks, overrides(data, run, FOUR_LAYERS, "num_steps=1"))
    return run


def run_of(base: Path, data: Path, run_dir: Path, num_steps: int, *options: str) -> list[str]:
    """Return the arguments of a run that starts from the weights of ``base``."""
    more = [f"checkpoint.load={base}/checkpoints", f"num_steps={num_steps}", "checkpoint.save_every=0"]
    return overrides(data, run_dir, FOUR_LAYERS, *more, *options)


@pytest.fixture(scope="module")
def on_one_rank(ranks, data, base, tmp_path_factory) -> Callable[[int], Path]:
    """Return a function that returns the directory of a run of one rank with its number of steps.

    The directory also has the responses of the run, responses.jsonl.
    """

    @functools.cache
    def run_of_steps(num_steps: int) -> Path:
        run = tmp_path_factory.mktemp("one") / "run"
        train(ranks, run_of(base, data, run, num_steps, f"tests.record={run}/responses.jsonl"))
        return run

    return run_of_steps


@pytest.mark.parametrize(("name", "num_steps"), NUM_STEPS)
def test_steps_on_recorded_responses_have_the_same_losses(ranks, data, base, on_one_rank, tmp_path, name, num_steps):
    one = on_one_rank(num_steps)
    replay = f"tests.replay={one}/responses.jsonl"
    train(ranks, run_of(base, data, tmp_path / "run", num_steps, *LAYOUTS[name], replay), 2)
    assert_same_losses(one, tmp_path / "run", num_steps)


@combinations(name=list(LAYOUTS), quick={"name": ["CP2"]}, strength=1)
def test_the_first_steps_sampled_responses_are_equal(ranks, data, base, on_one_rank, tmp_path, name):
    record = f"tests.record={tmp_path}/responses.jsonl"
    train(ranks, run_of(base, data, tmp_path / "run", 1, *LAYOUTS[name], record), 2)
    assert recorded(tmp_path / "responses.jsonl", step=0) == recorded(on_one_rank(3) / "responses.jsonl", step=0)


def assert_same_losses(one: Path, other: Path, num_steps: int) -> None:
    expected, got = reproducible_metrics(one), reproducible_metrics(other)
    assert len(expected) == len(got) == num_steps
    for a, b in zip(expected, got, strict=True):
        assert b["loss/mean"] == pytest.approx(a["loss/mean"], abs=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["tokens/response"] == a["tokens/response"]
