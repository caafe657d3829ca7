# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The steps of a whole run are the same steps in every layout."""

from __future__ import annotations

import pytest
from tiers import combinations
from tiny_run import TWO_RANKS, recorded, reproducible_metrics

LAYOUTS = TWO_RANKS | {
    "PP2xVPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
}
FOUR_LAYERS = "model.num_layers=4"  # for the four chunks of PP2xVPP2
NUM_STEPS = [
    pytest.param("PP2xVPP2", 3, id="PP2xVPP2, 3 steps"),
    *(pytest.param(name, 8, id=f"{name}, 8 steps", marks=pytest.mark.full) for name in LAYOUTS),
]


@pytest.fixture(scope="module")
def options(runs) -> list[str]:
    base = runs(FOUR_LAYERS, "num_steps=1")
    return [FOUR_LAYERS, f"checkpoint.load={base}/checkpoints", "checkpoint.save_every=0"]


@pytest.mark.parametrize(("name", "num_steps"), NUM_STEPS)
def test_steps_on_recorded_responses_have_the_same_losses(runs, options, name, num_steps):
    own = [*options, f"num_steps={num_steps}"]
    expected, got = (reproducible_metrics(run) for run in (runs(*own), runs.replayed(*own, more=LAYOUTS[name])))
    assert len(expected) == len(got) == num_steps
    for a, b in zip(expected, got, strict=True):
        assert b["loss/mean"] == pytest.approx(a["loss/mean"], abs=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["tokens/response"] == a["tokens/response"]


@pytest.mark.full
@combinations(name=list(LAYOUTS))
def test_the_first_steps_sampled_responses_are_equal(runs, options, name):
    one, other = runs(*options, "num_steps=3"), runs(*options, *LAYOUTS[name], "num_steps=1", world_size=2)
    assert recorded(other / "responses.jsonl", step=0) == recorded(one / "responses.jsonl", step=0)
