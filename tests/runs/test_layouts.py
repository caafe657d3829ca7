# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Twenty steps of a whole run are the same steps in every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from tiers import combinations
from tiny_run import overrides, recorded, reproducible_metrics, train

STEPS = 20
LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "DP2": [],
    "CP2": ["parallel.context_parallel_size=2"],
    "PP2xVPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def folder(ranks, own_data) -> Path:
    """Return a directory with data, a checkpoint to start from, and 20 steps of one rank with their responses."""
    data = own_data
    train(ranks, overrides(data, data / "start", "num_steps=1", "optimizer.lr=0"))
    train(ranks, run_of(data, "one", f"rollout.record={data}/one.jsonl"))
    return data


def run_of(folder: Path, name: str, *options: str) -> list[str]:
    start = f"checkpoint.load={folder}/start/checkpoints"
    return overrides(folder, folder / name, start, f"num_steps={STEPS}", "checkpoint.save_every=0", *options)


@combinations(name=list(LAYOUTS), quick={"name": ["PP2xVPP2"]}, strength=1)
def test_twenty_steps_on_recorded_responses_have_the_same_losses(ranks, folder, name):
    train(ranks, run_of(folder, name, *LAYOUTS[name], f"rollout.replay={folder}/one.jsonl"), 2)
    assert_same_losses(folder / "one", folder / name)


@pytest.mark.full
def test_torchrun_gives_the_same_losses(folder):
    """The command that a lab types, with two processes that torchrun starts."""
    arguments = run_of(folder, "torchrun", *LAYOUTS["PP2"], f"rollout.replay={folder}/one.jsonl")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_selfdistill.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tiny_run.REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same_losses(folder / "one", folder / "torchrun")


@combinations(name=list(LAYOUTS), quick={"name": ["CP2"]}, strength=1)
def test_the_first_steps_sampled_responses_are_equal(ranks, folder, name):
    recording = folder / f"sampled_{name}.jsonl"
    train(ranks, run_of(folder, f"sampled_{name}", *LAYOUTS[name], "num_steps=1", f"rollout.record={recording}"), 2)
    assert recorded(recording, step=0) == recorded(folder / "one.jsonl", step=0)


def assert_same_losses(one: Path, other: Path) -> None:
    expected, got = reproducible_metrics(one), reproducible_metrics(other)
    assert len(expected) == len(got) == STEPS
    for a, b in zip(expected, got, strict=True):
        assert b["loss/mean"] == pytest.approx(a["loss/mean"], abs=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["tokens/response"] == a["tokens/response"]
