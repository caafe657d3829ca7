# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs with adapters: they train the adapters alone, teach with the base, resume bit for bit, and refuse what lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import assert_resumes_equal, final_tensors, overrides, reproducible_metrics, train

ADAPTED = ("adapter.rank=4", "adapter.alpha=8")


@pytest.fixture(scope="module")
def base(ranks, data, tmp_path_factory) -> Path:
    """Return the run of which all others start."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(ranks, overrides(data, run, "num_steps=1"))
    return run


def weights(ranks, run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the model in a checkpoint of a run."""
    (stored,) = ranks.run(final_tensors, run, step, world_size=1)
    return {key: value for key, value in stored.items() if key.startswith(("decoder.", "embedding.", "output_layer."))}


def arguments(data: Path, run: Path, base: Path, *more: str) -> list[str]:
    return overrides(
        data, run, f"checkpoint.load={base}/checkpoints", *ADAPTED, "checkpoint.save_every=1", "num_steps=4", *more
    )


@pytest.fixture(scope="module")
def whole(ranks, data, base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("adapted") / "run"
    train(ranks, arguments(data, run, base, f"rollout.record={run}/responses.jsonl"))
    return run


def test_a_run_trains_its_adapters_alone_and_resumes_bit_for_bit(ranks, data, base, whole):
    steps = reproducible_metrics(whole)
    assert all(step["gradient_norm"] > 0 for step in steps)
    before = weights(ranks, base, 1)
    after = weights(ranks, whole, 4)
    factors = {name for name in after if "_adapter." in name}
    assert factors and after.keys() - factors == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].any() for name in factors)
    assert not (whole / "teacher").exists()
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, base), step=3, num_steps=4)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        pytest.param(["parallel.pipeline_model_parallel_size=2"], marks=pytest.mark.full),
        pytest.param([], marks=pytest.mark.full),
    ],
)
def test_every_layout_learns_alike(ranks, data, base, whole, tmp_path, layout):
    replay = f"rollout.replay={whole}/responses.jsonl"
    train(ranks, arguments(data, tmp_path / "run", base, replay, *layout), 2)
    for expected, found in zip(reproducible_metrics(whole), reproducible_metrics(tmp_path / "run"), strict=True):
        assert found["loss/mean"] == pytest.approx(expected["loss/mean"], rel=1e-3, abs=1e-6)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
