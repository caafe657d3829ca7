# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the methods have the published constants, and refuse the keys that contradict a method."""

from __future__ import annotations

import pytest
from characters import Characters
from made_methods import composed, given_with, made
from term_arrays import signals

from megatron_selfdistill.config import ConfigError, load
from megatron_selfdistill.loss import Divergence

ENVIRONMENT = "environment.name=replying.Replying"


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
        ("dapd loss.normalize=sequences", r"method\.name=dapd needs loss\.normalize=tokens, got sequences"),
        ("dapd loss.rollout_correction=truncated", r"needs loss\.rollout_correction=none, got truncated"),
        ("dapd data.solutions=none", r"needs data\.solutions=given, got none"),
        (f"dapd {ENVIRONMENT} environment.max_turns=2", r"needs environment\.max_turns=1, got 2"),
        ("past method.hint_template='{solution}'", r"hint_template must have the slots \{attempt\}, and may have"),
        ("past teacher.weights=frozen", "needs teacher.weights=current or ema .* got frozen and 4"),
        ("past method.num_retries=1", "at least 2 for method.num_retries, or method.weight=0, got current and 1"),
        ("past loss.normalize=sequences", r"needs loss\.normalize=tokens, got sequences"),
        ("past loss.rollout_correction=truncated", "needs loss.rollout_correction=none, got truncated"),
        ("past environment.name=a.B", r"needs environment\.name=none, got a\.B"),
        ("rlcsd method.weight=0", r"method\.weight must be above 0"),
        ("rlcsd rollout.num_samples=1", "compares the responses to one problem"),
        ("rlcsd loss.normalize=sequences", r"needs loss\.normalize=tokens, got sequences"),
        ("rlcsd environment.name=a.B environment.max_turns=2", r"needs environment\.max_turns=1, got 2"),
        ("rltf_sd", r"environment.name is none: set it"),
        ("rltf_fm", r"environment.name is none: set it"),
        (f"rltf_sd {ENVIRONMENT} environment.max_turns=1", r"environment.max_turns of at least 2, got .* and 1$"),
        (f"rltf_fm {ENVIRONMENT} environment.max_turns=1", r"environment.max_turns of at least 2, got .* and 1$"),
        ("skald rollout.num_samples=1", "compares the responses to one problem"),
        ("skald environment.name=a.B", r"method\.name=skald needs environment\.name=none, got a\.B"),
        ("skald rollout.guidance=mixed", "rollout.guidance"),
        ("sr_opsd loss.divergence=jsd", r"method\.name=sr_opsd needs loss\.divergence=reverse_kl or forward_kl"),
        ("u_opsd rollout.num_samples=1", "compares the responses to one problem"),
    ],
)
def test_what_contradicts_a_method_is_refused(options, message):
    name, *overrides = options.split()
    with pytest.raises(ConfigError, match=message):
        load([f"recipe={name}", *overrides])
