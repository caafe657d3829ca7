# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run with adapters on random weights keeps these weights beside its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import assert_equal_runs, assert_resumes_equal, go_back_to_step, overrides, refusal, train

from megatron_selfdistill.instruments.explorer.given_models import initial_weights

ADAPTED = ("adapter.rank=4", "adapter.alpha=8")


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return every full tensor of the checkpoint at ``path``; needs an initialised process group."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    found: dict[str, torch.Tensor] = load_plain_tensors(str(path))
    return found


def arguments(data: Path, run: Path) -> list[str]:
    return overrides(data, run, *ADAPTED, "checkpoint.save_every=1", "num_steps=2")


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    train(ranks, arguments(data, run))
    return run


def test_random_weights_below_adapters_are_kept_beside_the_checkpoints(ranks, data, whole):
    (kept,) = ranks.run(final_weights, whole / "base", world_size=1)
    assert kept.keys() >= {"embedding.word_embeddings.weight"} and not any("_adapter." in name for name in kept)
    assert initial_weights(whole) == whole / "base"
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run), step=1, num_steps=2)


@pytest.mark.full
def test_a_kept_base_that_is_missing_is_named(ranks, data, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "base")
    go_back_to_step(1, run)
    assert f"{run}/base does not exist" in refusal(ranks, arguments(data, run))


@pytest.mark.full
def test_a_kept_base_is_used_again_after_a_kill_and_may_be_given_from_elsewhere(ranks, data, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")  # as if it had been killed during its first save
    written = (run / "base").stat().st_ino
    train(ranks, arguments(data, run))
    assert (run / "base").stat().st_ino == written
    assert_equal_runs(ranks, whole, run, 2)

    shutil.rmtree(run / "base")
    go_back_to_step(1, run)
    train(ranks, [*arguments(data, run), f"checkpoint.load={whole}/base"])
    assert_equal_runs(ranks, whole, run, 2)


@pytest.mark.full
def test_a_base_that_virtual_stages_kept_serves_one_rank(ranks, data, tmp_path):
    stages = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    more = [*ADAPTED, "model.num_layers=4", "checkpoint.save_every=1", "num_steps=3"]
    whole, record = tmp_path / "run", f"{tmp_path}/responses.jsonl"
    train(ranks, overrides(data, whole, *more, *stages, f"tests.record={record}"), 2)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    go_back_to_step(2, halves)
    train(ranks, overrides(data, halves, *more, f"tests.replay={record}", "checkpoint.resume=force"))
    expected, found = (
        ranks.run(final_weights, run / "checkpoints" / "iter_0000003", world_size=1)[0] for run in (whole, halves)
    )
    factors = [name for name in expected if name.endswith(("_adapter.a", "_adapter.b"))]
    assert factors and {name for name in found if "_adapter." in name} == {
        name for name in expected if "_adapter." in name
    }
    for name in factors:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
