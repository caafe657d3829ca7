# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distillation gradient does not depend on how the model and the batch are cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import layouts
import pytest
from layouts import Case, Joined, Outcomes, joined, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig

TOLERANCE = 1e-5


# name -> (model, cuts, world size)
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "one rank": ("shallow", parallel(), 1),
    "TP2": ("shallow", parallel(tp=2), 2),
    "TP2 tied": ("tied", parallel(tp=2), 2),
    "TP2+SP": ("shallow", parallel(tp=2, sp=True), 2),
    "TP4 tied": ("tied", parallel(tp=4), 4),
    "PP2": ("shallow", parallel(pp=2), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP4": ("gqa", parallel(pp=4), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("shallow", parallel(tp=2, pp=2, sp=True), 4),
    "TP2xPP2+SP tied": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "DP2": ("shallow", parallel(), 2),
    "CP2": ("shallow", parallel(cp=2), 2),
    "CP2xPP2": ("shallow", parallel(cp=2, pp=2), 4),
    "CP2xTP2+SP": ("shallow", parallel(cp=2, tp=2, sp=True), 4),
    "CP2 experts": ("moe", parallel(cp=2), 2),
    "EP2": ("moe", parallel(ep=2), 2),
    "EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}


ONE_PER_AXIS = ["TP2+SP", "PP2 tied", "PP2xVPP2", "CP2", "DP2", "EP2"]


STEPS = 2


@pytest.fixture(scope="module")
def outcomes(ranks):
    """Return the outcomes that the tests of this file have in common."""
    return Outcomes(ranks)


def case_of(name: str, **changes: Any) -> tuple[Case, int]:
    """Return the case of a layout, and its number of ranks."""
    kind, cuts, world_size = LAYOUTS[name]
    return Case(kind=kind, parallel=cuts, **changes), world_size


def reference_of(case: Case) -> Case:
    """Return the same step on one rank, with other cuts into microbatches."""
    return dataclasses.replace(
        case,
        parallel=ParallelConfig(),
        pair_order="teacher_first",
        paired=False,
        mutation=None,
        schedule=ScheduleConfig(),
        extra_weightless=0,
    )


def compare(got: Joined, alone: Joined, tolerance: float = TOLERANCE) -> float:
    """Assert loss, norm and every gradient of ``got`` equal those of one rank; return the worst difference."""
    assert alone[0].loss > 0.05, "the teacher must have something to say"
    worst, where = worst_difference(got[1], alone[1])
    assert worst <= tolerance, f"gradient of {where} differs by {worst:.1e}"
    assert got[0].loss == pytest.approx(alone[0].loss, rel=tolerance)
    assert got[0].grad_norm == pytest.approx(alone[0].grad_norm, rel=tolerance)
    return worst


def compare_parameters(got: Joined, alone: Joined) -> None:
    """Assert that every tensor has changed as much as on one rank.

    The tolerance is 1e-3 of the change, because only the last bits of a weight near 1 change.
    """
    moved, expected = (
        {key: value - layouts.models.full_weight(key, value.shape) for key, value in params.items()}
        for params in (got[2], alone[2])
    )
    assert all(change.norm() > 0 for change in expected.values()), "some parameter was never trained"
    worst, where = worst_difference(moved, expected)
    assert worst <= 1e-3, f"the change of {where} differs by {worst:.1e}"


@combinations(
    name=list(LAYOUTS), divergence=["reverse_kl", "forward_kl", "jsd"], quick={"name": ONE_PER_AXIS}, strength=1
)
def test_gradients_and_parameters_after_sgd_equal_those_of_one_rank(outcomes, name, divergence, record_property):
    """SGD without clipping: any wrong scale of any gradient shows, where Adam and clipping would hide it."""
    case, world_size = case_of(name, divergence=divergence, steps=STEPS)
    got, alone = outcomes(case, world_size), outcomes(reference_of(case))
    record_property("worst relative difference", compare(got, alone))
    compare_parameters(got, alone)


ADAM = OptimizerConfig(
    optimizer="adam",
    precision="fp32",
    lr=1e-3,
    adam_eps=1e-4,  # large enough that rounding noise in a vanishing gradient is not blown up to a whole step
    clip_grad=1.0,
    use_distributed_optimizer=False,
)


@pytest.mark.full
@pytest.mark.parametrize("name", ["TP2xPP2+SP tied", "PP2xVPP2", "CP2xTP2+SP", "EP2xPP2"])
def test_three_adam_steps_with_clipping_end_in_the_same_parameters(outcomes, name):
    case, world_size = case_of(name, steps=3, optimizer=ADAM)
    compare_parameters(outcomes(case, world_size), outcomes(reference_of(case)))


OVERLAPS = [
    {"use_distributed_optimizer": True},
    {"overlap_grad_reduce": True},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
]


@combinations(cuts={"DP2": parallel(), "DP2xPP2": parallel(pp=2)}, quick={"cuts": ["DP2"]}, strength=1)
def test_data_parallel_optimizers_end_in_the_same_parameters(outcomes, cuts):
    alone = outcomes(Case(kind="shallow", steps=3, optimizer=ADAM, extra_weightless=0))
    cases = [
        Case(kind="shallow", parallel=cuts, steps=3, optimizer=dataclasses.replace(ADAM, **overlap))
        for overlap in OVERLAPS
    ]
    for got in outcomes.of(cases, 2 * cuts.pipeline_model_parallel_size):
        compare_parameters(got, alone)


@combinations(name=["TP2+SP", "PP2", "PP4", "PP2xVPP2", "EP2xPP2", "CP2xPP2"], quick={"name": ["PP2xVPP2"]}, strength=1)
def test_pair_orders_give_the_same_gradients_to_the_last_bit(outcomes, name):
    case, world_size = case_of(name, paired=True)
    cases = [dataclasses.replace(case, pair_order=order) for order in ("teacher_first", "alternating")]
    one, two = outcomes.of(cases, world_size)
    assert one[0].loss == two[0].loss and one[0].grad_norm == two[0].grad_norm
    for key, gradient in one[1].items():
        assert gradient.equal(two[1][key]), key


def test_gradients_do_not_depend_on_how_microbatches_are_cut(outcomes):
    case = Case(kind="shallow", extra_weightless=0)
    alone, *others = outcomes.of([dataclasses.replace(case, max_tokens=most) for most in (56, 48, 64, 300)])
    assert len({outcome.num_microbatches for outcome, *_ in (alone, *others)}) > 2
    for got in others:
        compare(got, alone)


@combinations(name=["EP2xTP2+SP", "CP2 experts"], quick={"name": ["CP2 experts"]}, strength=1)
def test_the_balancing_loss_of_real_tokens_has_the_same_gradient_however_a_row_is_cut(outcomes, name):
    """The loss balances a microbatch, so all contexts are in one row.  Another one has nothing but padding."""
    case, world_size = case_of(name, model_changes={"moe_aux_loss_coeff": 0.05}, max_tokens=300)
    unbalanced = dataclasses.replace(case, model_changes={})
    got, (_, without, _) = outcomes.of([case, unbalanced], world_size)
    compare(got, outcomes(dataclasses.replace(case, parallel=parallel())))
    assert any("router" in key and not gradient.equal(without[key]) for key, gradient in got[1].items())


@combinations(name=["TP2+SP", "CP2", "EP2"], quick={"name": ["CP2"]}, strength=1)
def test_gradients_do_not_depend_on_padding_to_a_quantum_of_lengths(outcomes, name):
    case, world_size = case_of(name, max_tokens=300, extra_weightless=0)
    compare(outcomes(dataclasses.replace(case, seq_quantum=128), world_size), outcomes(reference_of(case)))


RECOMPUTED = {
    "full": ScheduleConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "core_attn": ScheduleConfig(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "layernorm and mlp": ScheduleConfig(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]),
}


@pytest.mark.full
@pytest.mark.parametrize("name", ["PP2xVPP2", "TP2xPP2+SP"])
def test_recomputing_activations_changes_no_gradient(outcomes, name):
    case, world_size = case_of(name)
    cases = [dataclasses.replace(case, schedule=recompute) for recompute in RECOMPUTED.values()]
    for got in outcomes.of(cases, world_size):
        compare(got, outcomes(reference_of(case)))


@combinations(name=["TP2xPP2+SP", "PP2xVPP2 tied", "CP2", "EP2xPP2"], quick={"name": ["PP2xVPP2 tied"]}, strength=1)
def test_the_current_weights_teach_alike_in_every_layout(outcomes, name):
    case, world_size = case_of(name, teacher="current")
    compare(outcomes(case, world_size), outcomes(reference_of(case)))


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
