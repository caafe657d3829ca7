# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distillation gradient does not depend on how the model and the batch are cut."""

from __future__ import annotations

import dataclasses

import pytest
from layouts import joined
from models import parallel
from parity import LAYOUTS, case_of, compare, compare_parameters, reference_of
from tiers import combinations

ONE_PER_AXIS = ["TP2+SP", "PP2 tied", "PP2xVPP2", "CP2", "DP2", "EP2"]
WITH_EVERY_DIVERGENCE = ["TP2+SP", "CP2", "DP2"]
STEPS = 2


def divides_the_loss(name: str, divergence: str) -> bool:
    """Return whether a case shows more than the others do: only these layouts divide what a divergence sums."""
    return divergence == "reverse_kl" or name in WITH_EVERY_DIVERGENCE


@combinations(
    name=list(LAYOUTS),
    divergence=["reverse_kl", "forward_kl", "jsd"],
    quick={"name": ONE_PER_AXIS},
    strength=1,
    valid=divides_the_loss,
)
def test_gradients_and_parameters_after_sgd_equal_those_of_one_rank(outcomes, name, divergence, record_property):
    """SGD without clipping: any wrong scale of any gradient shows, where Adam and clipping would hide it."""
    case, world_size = case_of(name, divergence=divergence, steps=STEPS)
    got, alone = outcomes(case, world_size), outcomes(reference_of(case))
    record_property("worst relative difference", compare(got, alone))
    compare_parameters(got, alone)


WINDOWS_AND_SINKS = {"window_size": [4, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"}


@pytest.mark.full
@combinations(name=["TP2", "TP2+SP", "PP2xVPP2", "CP2"], quick={"name": ["TP2", "CP2"]}, strength=1)
def test_windows_and_sinks_have_the_same_gradients_however_they_are_cut(outcomes, name):
    case, world_size = case_of(name, model_changes={"transformer": WINDOWS_AND_SINKS})
    got, alone = outcomes(case, world_size), outcomes(reference_of(case))
    compare(got, alone)
    assert any(key.endswith("core_attention.softmax_offset") and gradient.any() for key, gradient in got[1].items())


BIASED_EXPERTS = {
    "add_bias_linear": True,
    "activation": "quick_gelu",
    "transformer": {"activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0, "softmax_type": "learnable"},
}


@pytest.mark.full
@combinations(
    name=["TP2+SP experts", "EP2", "EP2xPP2", "EP2xTP2+SP", "CP2 experts"],
    quick={"name": ["EP2xTP2+SP", "TP2+SP experts"]},
    strength=1,
)
def test_experts_with_biases_have_the_same_gradients_however_they_are_cut(outcomes, name):
    case, world_size = case_of(name, model_changes=BIASED_EXPERTS)
    got, alone = outcomes(case, world_size), outcomes(reference_of(case))
    compare(got, alone)
    biases = {key for key, gradient in got[1].items() if key.endswith("bias") and gradient.any()}
    assert {".".join(key.split(".")[-2:]) for key in biases} >= {"linear_fc1.bias", "linear_fc2.bias", "router.bias"}


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


MUTATIONS = {
    "one rank": [
        "gradient x num_microbatches",
        "padded column left in the softmax",
        "teacher and student swapped",
        "response position off by one",
    ],
    "TP2+SP": ["backbone gradient x TP", "layer-norm all-reduce dropped"],
    "CP2": ["gradient x CP"],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_parity_test_catches(outcomes, name):
    case, world_size = case_of(name)
    cases = [dataclasses.replace(case, mutation=mutation) for mutation in MUTATIONS[name]]
    alone = outcomes(reference_of(case))
    for per_rank in outcomes.per_rank(cases, world_size):
        with pytest.raises(AssertionError, match=r"differs by|disagree|approx|=="):
            compare(joined(per_rank), alone)
