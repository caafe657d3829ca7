# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that was stopped, or killed, and resumed equals one that never stopped, bit for bit."""

from __future__ import annotations

import pytest
from ranks import RankError
from tiers import combinations
from tiny_run import TWO_RANKS, assert_equal_runs, overrides, recorded, reproducible_metrics, saved_step, train

STAGES = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
UNEVEN = ("schedule.max_tokens=48", "seed=5")
"""Contexts, with their controls, move between two replicas in the first and the third step."""
STUDENT = "target.anchor=student"
OVERLAPPED = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
EXPERTS = (
    *("parallel.expert_model_parallel_size=2", "model.num_moe_experts=4", "model.moe_ffn_hidden_size=32"),
    *("model.moe_router_enable_expert_bias=true", "model.moe_router_score_function=sigmoid"),
)
CONTROLS = (
    *("target.control=other", "target.num_controls=2", "target.anchor=0.2", "teacher.offload=cpu", *UNEVEN),
    *("schedule.pair_order=teacher_first", "schedule.teacher_store_gb=0"),  # so that states go to host memory
)
GATED_DELTA = (
    "+model.transformer={experimental_attention_variant: gated_delta_net, linear_attention_freq: [1, 0], "
    "linear_num_key_heads: 2, linear_num_value_heads: 4, linear_key_head_dim: 8, linear_value_head_dim: 8, "
    "attention_output_gate: true, layernorm_zero_centered_gamma: true}"
)
LAYOUTS = {
    "one rank, bf16, EMA teacher": (1, ["optimizer.precision=bf16", "teacher.weights=ema", "teacher.ema_decay=0.9"]),
    "one rank, current weights, one k per batch": (1, ["teacher.weights=current", "target=batch", STUDENT]),
    "DP2, bf16, overlapped": (2, [*OVERLAPPED, "optimizer.precision=bf16", *UNEVEN]),
    "PP2xVPP2, saved in the background": (2, [*STAGES, "model.num_layers=4", "checkpoint.async_save=true"]),
    "EP2": (2, EXPERTS),
    "controls on DP2": (2, CONTROLS),
    "an anchor with a share of the reference, PP2": (2, ["target.anchor=0.2", STAGES[0]]),
    "gated delta nets": (1, ["model.qk_layernorm=true", "model.rotary_percent=0.5", GATED_DELTA]),
}


@combinations(name=list(LAYOUTS), quick={"name": ["DP2, bf16, overlapped"]}, strength=1)
def test_a_resumed_run_equals_one_that_never_stopped(runs, name):
    world_size, options = LAYOUTS[name]
    runs.resumed(*options, "num_steps=3", "checkpoint.save_every=2", step=2, world_size=world_size)


@combinations(place=["step", "save"], quick={"place": ["save"]}, strength=1)
def test_a_run_killed_in_the_middle_of(place, ranks, data, finished, tmp_path):
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, overrides(data, tmp_path / "killed"), kill_at=place)
    assert saved_step(tmp_path / "killed") == 3
    train(ranks, overrides(data, tmp_path / "killed"))
    assert_equal_runs(ranks, finished, tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*")), "nothing of the killed save may stay behind"


OTHER_LAYOUTS = TWO_RANKS | {"DP2": ["optimizer.overlap_grad_reduce=true"]}
OPTIONS = ("teacher.weights=ema", "checkpoint.save_every=2", "num_steps=3", "metrics.teacher_every=1")


@combinations(name=list(OTHER_LAYOUTS), quick={"name": ["DP2"]}, strength=1)
def test_resuming_in_another_layout_goes_on_with_the_same_problems_responses_and_loss(runs, tmp_path, name):
    """Data position, seeds, teacher and reference exactly; the first loss to 1e-5."""
    record = f"tests.record={tmp_path}/other.jsonl"
    whole, other = runs(*OPTIONS), runs.continued(*OPTIONS, step=2, more=[*OTHER_LAYOUTS[name], record], then=2)
    assert recorded(tmp_path / "other.jsonl", step=2) == recorded(whole / "responses.jsonl", step=2)
    one, two = (reproducible_metrics(run)[2] for run in (whole, other))
    for key in ("loss/mean", "teacher_cross_entropy"):
        assert two[key] == pytest.approx(one[key], abs=1e-5)
