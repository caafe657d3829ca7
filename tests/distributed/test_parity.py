# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distillation gradient does not depend on how the model and the batch are cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from layouts import Case, joined
from models import KINDS, parallel
from parity import AMPLIFICATION, LAYOUTS, OTHERWISE, amplification, case_of, compare, compare_parameters, reference_of
from tiers import combinations

ONE_PER_AXIS = ["TP2+SP", "PP2xVPP2", "CP2", "EP2"]
DIVIDING_THE_LOSS = ["TP2+SP", "CP2", "DP2"]
"""The layouts that divide what a divergence sums: the others show nothing more with a second divergence."""


@combinations(
    name=list(LAYOUTS),
    divergence=["reverse_kl", "forward_kl", "jsd"],
    quick={"name": ONE_PER_AXIS},
    strength=1,
    valid=lambda name, divergence: divergence == "reverse_kl" or name in DIVIDING_THE_LOSS,
)
def test_gradients_and_parameters_after_sgd_equal_those_of_one_rank(outcomes, name, divergence, record_property):
    """SGD without clipping: any wrong scale of any gradient shows, where Adam and clipping would hide it."""
    case, world_size = case_of(name, divergence=divergence, steps=2)
    got, alone = outcomes(case, world_size), outcomes(reference_of(case))
    record_property("worst relative difference", compare(got, alone))
    compare_parameters(got, alone)


GATED = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}
BIASED = {"activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0, "softmax_type": "learnable"}
FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "norms over all heads": ({"qk_layernorm_all_heads": True}, ("TP2", "TP2+SP", "CP2xTP2+SP", "PP2"), "q_layernorm"),
    "a layer without rope": ({"transformer": {"no_rope_freq": [0, 1]}}, ("CP2", "PP2", "TP2+SP"), "linear_qkv"),
    "a gated shared expert": ({"transformer": GATED}, ("EP2", "EP2xTP2+SP", "EP2xPP2"), "gate_weight"),
    "windows and sinks": (
        {"transformer": {"window_size": [4, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"}},
        ("TP2", "TP2+SP", "PP2xVPP2", "CP2"),
        "core_attention.softmax_offset",
    ),
    "experts with biases": (
        {"add_bias_linear": True, "activation": "quick_gelu", "transformer": BIASED},
        ("TP2+SP experts", "EP2", "EP2xPP2", "EP2xTP2+SP", "CP2 experts"),
        "linear_fc1.bias linear_fc2.bias router.bias",
    ),
}
"""Changes of a model, layouts, and the parts of its names whose gradients are not zero."""


@combinations(
    feature=list(FEATURES),
    layout=sorted({layout for _, layouts, _ in FEATURES.values() for layout in layouts}),
    valid=lambda feature, layout: layout in FEATURES[feature][1],
    quick={"feature": list(FEATURES)[:3], "layout": ["TP2+SP", "CP2", "EP2xTP2+SP"]},
    strength=1,
)
def test_the_layers_that_only_some_families_have_are_alike_in_every_layout(outcomes, feature, layout):
    changes, _, names = FEATURES[feature]
    case, world_size = case_of(layout, model_changes=changes)
    got = outcomes(case, world_size)
    compare(got, outcomes(reference_of(case)))
    trained = [key for key, gradient in got[1].items() if gradient.any()]
    assert all(any(name in key for key in trained) for name in names.split()), trained


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gqa" else pytest.mark.full) for kind in KINDS]
)
def test_a_model_amplifies_a_change_of_its_weights_as_its_bound_says(ranks, kind):
    """The measurement is that of exact arithmetic, up to the curvature: it does not depend on the machine."""
    stated = AMPLIFICATION.get(kind, OTHERWISE)
    assert stated / 4 <= amplification(ranks, Case(kind=kind), seed=1) <= 2 * stated


@combinations(name=["EP2xTP2+SP", "CP2 experts"], quick={"name": ["CP2 experts"]}, strength=1)
def test_the_balancing_loss_of_real_tokens_has_the_same_gradient_however_a_row_is_cut(outcomes, name):
    """The loss balances a microbatch, so all contexts are in one row.  Another one has nothing but padding."""
    case, world_size = case_of(name, model_changes={"transformer": {"moe_aux_loss_coeff": 0.05}}, max_tokens=300)
    unbalanced = dataclasses.replace(case, model_changes={})
    got, (_, without, _) = outcomes.of([case, unbalanced], world_size)
    compare(got, outcomes(dataclasses.replace(case, parallel=parallel())))
    assert any("router" in key and not gradient.equal(without[key]) for key, gradient in got[1].items())


def test_a_shard_that_is_all_padding_changes_no_gradient(outcomes):
    """128 * TP2 = 256 rows for 61 tokens: the second rank holds padding only."""
    case, world_size = case_of("TP2")
    wide = dataclasses.replace(case, model_changes={"make_vocab_size_divisible_by": 128})
    compare(outcomes(wide, world_size), outcomes(reference_of(case)))


SWAPPED, SHIFTED = "teacher and student swapped", "response position off by one"
MUTATIONS = {
    "one rank": ["gradient x num_microbatches", "padded column left in the softmax", SWAPPED, SHIFTED],
    "TP2+SP": ["backbone gradient x TP", "layer-norm all-reduce dropped"],
    "CP2": ["gradient x CP"],
}


@pytest.mark.full
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_parity_test_catches(outcomes, name):
    case, world_size = case_of(name)
    cases = [dataclasses.replace(case, mutation=mutation) for mutation in MUTATIONS[name]]
    alone = outcomes(reference_of(case))
    for per_rank in outcomes.per_rank(cases, world_size):
        with pytest.raises(AssertionError, match=r"differs by|disagree|approx|=="):
            compare(joined(per_rank), alone)
