# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The published constants of recipes whose hints are written on the way."""

from __future__ import annotations

from megatron_selfdistill.config import load


def test_sdpo_with_feedback_has_the_constants_of_rich_feedback():
    config = load(["recipe=sdpo_feedback"])
    assert config.data.solutions == "peer_or_feedback" and config.loss.divergence == "reverse_kl"
    assert (config.data.global_batch_size, config.rollout.num_samples) == (32, 8)
    assert (config.teacher.weights, config.teacher.ema_decay) == ("ema", 0.95)
    assert (config.loss.rollout_correction, config.loss.rollout_correction_cap) == ("truncated", 2.0)
    assert config.optimizer.lr == 1e-6 and not config.has_policy_term
    assert config.data.teacher_template == "{problem}{solution}\n\nCorrectly solve the original question."


def test_skill_sd_has_the_weight_of_the_paper_and_current_weights():
    config = load(["recipe=skill_sd"])
    assert (config.distill.weight, config.distill.signal, config.teacher.weights) == (0.001, "sampled", "current")
    assert (config.data.solutions, config.hints.keep, config.hints.exploration) == ("skill", 8, 1.0)
    assert config.policy.weight == 1 and config.rollout.view == "plain" and config.target.rule == "teacher_alone"
    assert config.measures_log_probs and config.asks_model


def test_openclaw_has_the_constants_of_the_published_code():
    config = load(["recipe=openclaw"])
    assert (config.distill.weight, config.distill.signal, config.policy.weight) == (1.0, "advantage", 1.0)
    assert (config.policy.clip_low, config.policy.clip_high) == (0.2, 0.28)
    assert (config.hints.votes, config.hints.min_length, config.rollout.temperature) == (1, 10, 0.6)
    assert (config.data.global_batch_size, config.optimizer.lr, config.teacher.weights) == (16, 1e-5, "current")
    assert config.data.teacher_template == "{problem}\n\n[user's hint / instruction]\n{solution}"
    assert config.samples and config.logged and not config.judges_responses


def test_a_run_on_logs_with_functions_builds_no_sampler():
    functions = ["hints.judge=a.b", "policy.reward=a.b"]
    assert not load(["recipe=openclaw", *functions]).samples
    assert load(["recipe=openclaw", functions[0]]).samples, "the model judges the rewards"
