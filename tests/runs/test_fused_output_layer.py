# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with the output layer fused with the loss are the runs without."""

from __future__ import annotations

import pytest
import tiny_run
import torch
from tiers import combinations
from tiny_run import overrides, reproducible_metrics

from megatron_selfdistill import learner
from megatron_selfdistill.pipeline import schedule

# 20 tokens of a microbatch's 100 or so; rounding has moved no sampled token in these few steps
FUSED = {mode: [f"loss.fused={mode}", "loss.fused_chunk_tokens=20"] for mode in ("keep_gradient", "low_memory")}
LAYOUTS = {
    "DP2, all overlapped": ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"],
    "TP2+SP, current teacher": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "teacher.weights=current",
    ],
    "PP2, tied, average teacher": [
        "parallel.pipeline_model_parallel_size=2",
        "model.share_embeddings_and_output_weights=true",
        "teacher.weights=ema",
    ],
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2+SP, current teacher"]}, strength=1)
def test_a_run_has_the_same_metrics_fused_and_materialised(ranks, own_data, layout):
    runs = []
    for name, options in {"none": ["loss.fused=none"], **FUSED}.items():
        run_dir = own_data / f"{layout.split(',')[0]}_{name}"
        arguments = overrides(own_data, run_dir, *LAYOUTS[layout], *options, "checkpoint.save_every=0")
        statuses = ranks.run(tiny_run.start, arguments, world_size=2, init_process_group=False)
        assert statuses == [0, 0]
        runs.append(reproducible_metrics(run_dir))
    expected = runs[0]
    assert len(expected) == 6 and expected[-1]["loss/mean"] != expected[0]["loss/mean"]
    for got in runs[1:]:
        for a, b in zip(expected, got, strict=True):
            assert b["loss/mean"] == pytest.approx(a["loss/mean"], abs=1e-5)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
            assert b["tokens/response"] == a["tokens/response"]


def start_counting(arguments: list[str]) -> tuple[int, int, int]:
    """Return the exit status, the number of projections of a whole microbatch, and the number of scored responses."""
    projected: list[torch.Size] = []
    scored: list[int] = []
    project, learnabilities = schedule.project, learner.learnabilities
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "project", lambda *a: (projected.append(a[1].shape), project(*a))[1])
        patch.setattr(learner, "learnabilities", lambda a, *b: (scored.append(len(a)), learnabilities(a, *b))[1])
        return tiny_run.start(arguments), len(projected), sum(scored)


@combinations(weights=["current", "ema"], quick={"weights": ["ema"]}, strength=1)
def test_a_fused_run_never_projects_a_whole_microbatch_not_even_to_score_solutions(ranks, own_data, tmp_path, weights):
    own = ["data.solutions=own", "solutions.pick=learnable", "solutions.num_samples=6", "num_steps=2"]
    own += ["evaluation.verifier=tiny_run.starts_with_an_even_token", f"teacher.weights={weights}"]
    own += ["checkpoint.save_every=0", "parallel.tensor_model_parallel_size=2"]
    found = {}
    for mode, options in {"none": ["loss.fused=none"], "low_memory": FUSED["low_memory"]}.items():
        arguments = overrides(own_data, tmp_path / mode, *own, *options)
        found[mode] = ranks.run(start_counting, arguments, world_size=2, init_process_group=False)
    for (status, projected, scored), (fused_status, fused_projected, fused_scored) in zip(*found.values(), strict=True):
        assert status == fused_status == 0
        assert scored == fused_scored > 0 and projected > 0
        assert fused_projected == 0


@pytest.mark.full
def test_the_run_says_how_its_output_layer_works(own_data):
    arguments = overrides(own_data, own_data / "planned", "dry_run=true", "metrics.console=true")
    done = tiny_run.in_new_process([*arguments, "loss.max_logits_gb=0", "loss.fused_chunk_tokens=20"])
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "output layer: fused with the loss in chunks of 20 tokens, low_memory, at most 0.00 GiB" in words


def test_a_baseline_cannot_be_asked_to_fuse(own_data):
    arguments = overrides(own_data, own_data / "refused", "objective=rft", *FUSED["low_memory"])
    done = tiny_run.in_new_process(arguments)
    assert done.returncode == 2
    assert "loss.fused=low_memory fuses the output layer with the distillation loss, but objective=" in done.stderr
