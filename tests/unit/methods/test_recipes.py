# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the methods have the published constants, and refuse the keys that contradict a method."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from characters import Characters
from made_methods import composed, given_with, made
from term_arrays import signals

from megatron_selfdistill.config import ConfigError, load
from megatron_selfdistill.loss import Divergence

ALONE = {"target.rule": "teacher_alone", "teacher.weights": "frozen"}
FORWARD = {"loss.divergence": "forward_kl"}
MIXED = {"target.rule": "fixed", "target.k": None, "target.teacher_weight": 1.0}
NO_NUMBERS = {"needs.rewards": False, "needs.log_probs": None}
RLTF = {
    **{"has_teacher": False, "data.global_batch_size": 32, "rollout.num_samples": 8},
    **{"method.weight": 1.0, "method.credit": "turn", "method.discount": 0.1, "method.advantage_std": "none"},
    **{"method.clip_low": None, "method.clip_high": None, "method.ratio_cap": None},
    **{"method.revision_baseline": "first_turn", "method.revision_min_log_prob": -5.0, "environment.max_turns": 2},
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "beta_opsd": {**MIXED, "target.anchor": "reference", **NO_NUMBERS},
    "dapd": {**ALONE, **FORWARD, "needs.contexts_per_sample": 6, "needs.log_probs": None},
    "eopd": {**ALONE, **NO_NUMBERS},
    "openclaw": {
        **{"method.distill_weight": 1.0, "method.signal": "advantage", "method.weight": 1.0},
        **{"method.clip_low": 0.2, "method.clip_high": 0.28, "method.votes": 1, "method.min_length": 10},
        **{"rollout.temperature": 0.6, "data.global_batch_size": 16, "optimizer.lr": 1e-5},
        **{"teacher.weights": "current", "samples": True, "logged": True, "judges_responses": False},
        "method.teacher_template": "{problem}\n\n[user's hint / instruction]\n{solution}",
    },
    "opsa": {"needs.teacher_prompt": None, "needs.rewards": False, "needs.log_probs": "sampled"},
    "ovd": {
        **{"method.threshold": 5.0, "method.use": "filter", "rollout.num_samples": 8, "teacher.weights": "frozen"},
        **{"keeps_teacher": True, "has_teacher": False, "method.ratio_cap": 2.0},
        **{"method.clip_low": None, "method.clip_high": None},
    },
    "past": {
        **{**ALONE, **FORWARD, "teacher.weights": "current", "needs.hint": "function", "needs.rewards": True},
        **{"needs.log_probs": "measured", "needs.contexts_per_sample": 5, "method.teacher_steps": 25},
    },
    "past method.weight=0": {
        **{"needs.contexts_per_sample": 1, "needs.log_probs": None, "needs.asks_model": False},
    },
    "rlcsd": {"keeps_teacher": True, "has_teacher": False, "needs.rewards": True},
    "rlt": {
        **{"method.closing_tag": "</think>", "method.temperature": 0.7, "method.alpha": 0.01},
        **{"method.ratio_weight": 3.0, "method.missing_tag_penalty": 1.0, "method.kl_weight": 0.04},
        **{"rollout.num_samples": 64, "data.global_batch_size": 16, "optimizer.lr": 1e-6, "num_steps": 125},
        **{"optimizer.lr_decay.style": "constant", "method.weight": 1.0, "teacher.weights": "frozen"},
        **{"needs.teacher_prompt": "same", "needs.samples": "teacher"},
    },
    "rltf_sd": {**RLTF, "method.revision_weight": 0.1, "method.reply_weight": 0.0},
    "rltf_fm": {**RLTF, "method.revision_weight": 0.0, "method.reply_weight": 0.1},
    "sdpo_feedback": {
        **{"method.hints": "peer_or_feedback", "loss.divergence": "reverse_kl", "data.global_batch_size": 32},
        **{"rollout.num_samples": 8, "teacher.weights": "ema", "teacher.ema_decay": 0.95, "optimizer.lr": 1e-6},
        **{"loss.rollout_correction": "truncated", "loss.rollout_correction_cap": 2.0, "needs.log_probs": None},
        "method.teacher_template": "{problem}{solution}\n\nCorrectly solve the original question.",
    },
    "skald": {
        **{"target.rule": "fixed", "target.anchor": "student", "teacher.weights": "current"},
        **{"target.teacher_weight": 2.5, "target.k": 2.5, "needs.rewards": True, **FORWARD},
    },
    "skill_sd": {
        **{"method.distill_weight": 0.001, "method.signal": "sampled", "teacher.weights": "current"},
        **{"method.keep": 8, "method.exploration": 1.0, "method.weight": 1.0, "method.summarizer": "model"},
        **{"needs.samples": "student", "target.rule": "teacher_alone", "needs.log_probs": "measured"},
        "needs.asks_model": True,
    },
    "sr_opsd": {**MIXED, "target.anchor": "reference", **NO_NUMBERS},
    "tip": {
        **{**ALONE, "method.share": 0.5, "method.score": "soft_or", "optimizer.lr": 1e-6},
        **{"loss.divergence": "reverse_kl", "needs.log_probs": "measured"},
    },
    "u_opsd": NO_NUMBERS,
    "veto": {**MIXED, **FORWARD, **NO_NUMBERS, "target.anchor": "student", "teacher.weights": "frozen"},
}
"""Recipe, with further overrides -> key of the configuration, or what follows from it -> its published value."""
ENVIRONMENT = "environment.name=replying.Replying"


@pytest.mark.parametrize("recipe", CONSTANTS)
def test_a_recipe_has_the_published_constants(recipe):
    name, *overrides = recipe.split()
    overrides += [ENVIRONMENT] * name.startswith("rltf")
    config = composed(f"recipe={name}", *overrides)
    found = {key: reduce(getattr, key.split("."), config) for key in CONSTANTS[recipe]}
    assert found == pytest.approx(CONSTANTS[recipe])


@pytest.mark.parametrize("recipe", ["beta_opsd", "eopd", "sr_opsd", "u_opsd", "veto"])
def test_a_method_of_a_divergence_alone_weighs_the_tokens_with_a_hint_alike(recipe):
    method = made([f"recipe={recipe}"], given_with(Characters()))
    terms = method.terms(0, [], signals([0.0] * 2, lengths=[2, 1], hinted=[True, False]))
    assert not method.weighs_tokens and terms.divergence.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["recipe=default"], Divergence("reverse_kl")),
        (["recipe=eopd"], Divergence("reverse_kl", forward_above=0.8)),
        (["recipe=sr_opsd"], Divergence("reverse_kl", order=0.5)),
        (["recipe=sr_opsd", "method.order=1"], Divergence("reverse_kl")),
    ],
)
def test_a_setting_of_a_method_changes_the_divergence_of_this_method_alone(overrides, wanted):
    config = composed(*overrides)
    assert Divergence.configured(config.loss, config.method) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("beta_opsd method.signal=full method.discount=0.5", r"method\.discount=0\.5 .* set method\.signal=advantage"),
        ("beta_opsd method.signal=sampled method.discount=0.5", r"method\.discount=0\.5 .* set method\.signal="),
        ("dapd loss.normalize=sequences", "means of its own: leave loss.normalize=tokens, got seq"),
        ("dapd loss.rollout_correction=truncated", "data.solutions=given and loss.rollout_correction=none, got given"),
        ("dapd data.solutions=none", "needs data.solutions=given and loss.rollout_correction=none, got none and none"),
        (f"dapd {ENVIRONMENT} environment.max_turns=2", "set environment.max_turns=1, got 2"),
        ("past method.hint_template='{solution}'", r"hint_template must have the slots \{attempt\}, and may have"),
        ("past teacher.weights=frozen", "needs teacher.weights=current or ema .* got frozen and 4"),
        ("past method.num_retries=1", "at least 2 for method.num_retries, or method.weight=0, got current and 1"),
        ("past loss.normalize=sequences", "means of its own: leave loss.normalize=tokens, got sequences"),
        ("past loss.rollout_correction=truncated", "needs loss.rollout_correction=none, got truncated"),
        ("past environment.name=a.B", "set environment.name=none, got a.B"),
        ("rlcsd method.weight=0", r"method\.weight must be above 0"),
        ("rlcsd rollout.num_samples=1", "compares the responses to one problem"),
        ("rlcsd loss.normalize=sequences", "two means over tokens: loss.normalize is sequences"),
        ("rlcsd environment.name=a.B environment.max_turns=2", "compares responses to one prompt"),
        ("rltf_sd", r"environment.name is none: set it"),
        ("rltf_fm", r"environment.name is none: set it"),
        (f"rltf_sd {ENVIRONMENT} environment.max_turns=1", r"environment.max_turns of at least 2, got .* and 1$"),
        (f"rltf_fm {ENVIRONMENT} environment.max_turns=1", r"environment.max_turns of at least 2, got .* and 1$"),
        ("skald rollout.num_samples=1", "compares the responses to one problem"),
        ("skald environment.name=a.B", r"without a card: it needs environment\.name=none and .* got a\.B and none"),
        ("skald rollout.guidance=mixed", "rollout.guidance"),
        ("sr_opsd loss.divergence=jsd", r"method\.name=sr_opsd needs loss\.divergence=reverse_kl or forward_kl"),
        ("u_opsd rollout.num_samples=1", "compares the responses to one problem"),
    ],
)
def test_what_contradicts_a_method_is_refused(options, message):
    name, *overrides = options.split()
    with pytest.raises(ConfigError, match=message):
        load([f"recipe={name}", *overrides])
