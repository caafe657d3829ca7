# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distillation gradient does not depend on how the model and the batch are cut."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import layouts
import pytest
import torch
from layouts import Case, join, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig

TOLERANCE = 1e-5


# name -> (model, cuts, world size)
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "TP2": ("gqa", parallel(tp=2), 2),
    "TP2 tied": ("tied", parallel(tp=2), 2),
    "TP2+SP": ("gqa", parallel(tp=2, sp=True), 2),
    "TP4 tied": ("tied", parallel(tp=4), 4),
    "PP2": ("gqa", parallel(pp=2), 2),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP4": ("gqa", parallel(pp=4), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("gqa", parallel(tp=2, pp=2, sp=True), 4),
    "TP2xPP2+SP tied": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "DP2": ("gqa", parallel(), 2),
    "CP2": ("gqa", parallel(cp=2), 2),
    "CP2xPP2": ("gqa", parallel(cp=2, pp=2), 4),
    "CP2xTP2+SP": ("gqa", parallel(cp=2, tp=2, sp=True), 4),
    "EP2": ("moe", parallel(ep=2), 2),
    "EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}


ONE_PER_AXIS = ["TP2+SP", "PP2 tied", "PP2xVPP2", "CP2", "DP2", "EP2"]


@pytest.fixture(scope="module")
def outcomes(ranks):
    """Return a function that runs a case once per module and joins the shards of its ranks."""

    @cache
    def joined(key: str) -> tuple[Any, dict, dict]:
        case, world_size = pending[key]
        per_rank = ranks.run(layouts.run, case, world_size=world_size)
        losses = {outcome.loss for outcome in per_rank}
        assert len(losses) == 1, f"ranks disagree about the loss: {losses}"
        # The distributed optimizer leaves each rank only its slice of the reduced gradient.
        whole = not case.optimizer.use_distributed_optimizer
        return per_rank[0], join([o.grads for o in per_rank]) if whole else {}, join([o.params for o in per_rank])

    pending: dict[str, tuple[Case, int]] = {}

    def run(case: Case, world_size: int = 1):
        pending[repr((case, world_size))] = case, world_size
        return joined(repr((case, world_size)))

    return run


def compare(
    outcomes, case: Case, world_size: int, tolerance: float = TOLERANCE, reference: Case | None = None
) -> float:
    """Assert loss, norm and every gradient of ``case`` equal those of one rank; return the worst difference."""
    reference = reference or dataclasses.replace(
        case,
        parallel=ParallelConfig(),
        pair_order="teacher_first",
        paired=False,
        mutation=None,
        schedule=ScheduleConfig(),
        extra_weightless=0,
    )
    alone, expected, _ = outcomes(reference)
    assert alone.loss > 0.05, "the teacher must have something to say"
    got, grads, _ = outcomes(case, world_size)
    worst, where = worst_difference(grads, expected)
    assert worst <= tolerance, f"gradient of {where} differs by {worst:.1e}"
    assert got.loss == pytest.approx(alone.loss, rel=tolerance)
    assert got.grad_norm == pytest.approx(alone.grad_norm, rel=tolerance)
    return worst


@combinations(
    name=list(LAYOUTS), divergence=["reverse_kl", "forward_kl", "jsd"], quick={"name": ONE_PER_AXIS}, strength=1
)
def test_gradients_equal_those_of_one_rank(outcomes, name, divergence, record_property):
    kind, cuts, world_size = LAYOUTS[name]
    worst = compare(outcomes, Case(kind=kind, parallel=cuts, divergence=divergence), world_size)
    record_property("worst relative difference", worst)


@combinations(name=list(LAYOUTS), quick={"name": ["TP2+SP", "PP2xVPP2 tied", "EP2xTP2+SP"]}, strength=1)
def test_three_sgd_steps_end_in_the_same_parameters(outcomes, name):
    """SGD without clipping: any wrong scale of any gradient shows, where Adam and clipping would hide it."""
    kind, cuts, world_size = LAYOUTS[name]
    compare_parameters(outcomes, Case(kind=kind, parallel=cuts, steps=3), world_size)


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
    kind, cuts, world_size = LAYOUTS[name]
    compare_parameters(outcomes, Case(kind=kind, parallel=cuts, steps=3, optimizer=ADAM), world_size)


OVERLAPS = {
    "distributed": {"use_distributed_optimizer": True},
    "overlapped reduction": {"overlap_grad_reduce": True},
    "distributed, reduction and gather overlapped": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


@combinations(
    overlap=list(OVERLAPS), cuts={"DP2": parallel(), "DP2xPP2": parallel(pp=2)}, quick={"cuts": ["DP2"]}, strength=1
)
def test_data_parallel_optimizers_end_in_the_same_parameters(outcomes, overlap, cuts):
    optimizer = dataclasses.replace(ADAM, **OVERLAPS[overlap])
    case = Case(parallel=cuts, steps=3, optimizer=optimizer)
    world_size = 2 * cuts.pipeline_model_parallel_size
    compare_parameters(outcomes, case, world_size, reference=Case(steps=3, optimizer=ADAM, extra_weightless=0))


@combinations(name=["TP2+SP", "PP2", "PP4", "PP2xVPP2", "EP2xPP2", "CP2xPP2"], quick={"name": ["PP2xVPP2"]}, strength=1)
def test_pair_orders_give_the_same_gradients_to_the_last_bit(outcomes, name):
    kind, cuts, world_size = LAYOUTS[name]
    one, two = (
        outcomes(Case(kind=kind, parallel=cuts, paired=True, pair_order=order), world_size)
        for order in ("teacher_first", "alternating")
    )
    assert one[0].loss == two[0].loss and one[0].grad_norm == two[0].grad_norm
    for key, gradient in one[1].items():
        assert gradient.equal(two[1][key]), key


@pytest.mark.parametrize("max_tokens", [48, 64, 300])
def test_gradients_do_not_depend_on_how_microbatches_are_cut(outcomes, max_tokens):
    compare(outcomes, Case(max_tokens=max_tokens, extra_weightless=0), 1, reference=Case(extra_weightless=0))


@pytest.mark.parametrize("cuts", [parallel(ep=2, tp=2, etp=1, sp=True), parallel(cp=2)], ids=["EP2xTP2+SP", "CP2"])
def test_the_balancing_loss_of_real_tokens_has_the_same_gradient_however_a_row_is_cut(outcomes, cuts):
    """The loss balances a microbatch, so all contexts are in one row.  Another one has nothing but padding."""
    case = Case(kind="moe", parallel=cuts, model_changes={"moe_aux_loss_coeff": 0.05}, max_tokens=300)
    compare(outcomes, case, 2, reference=dataclasses.replace(case, parallel=parallel()))
    (_, balanced, _), (_, unbalanced, _) = outcomes(case, 2), outcomes(dataclasses.replace(case, model_changes={}), 2)
    assert any("router" in key and not balanced[key].equal(unbalanced[key]) for key in balanced)


@combinations(name=["TP2+SP", "CP2", "EP2"], quick={"name": ["CP2"]}, strength=1)
def test_gradients_do_not_depend_on_padding_to_a_quantum_of_lengths(outcomes, name):
    kind, cuts, world_size = LAYOUTS[name]
    reference = Case(kind=kind, max_tokens=300, extra_weightless=0)
    compare(outcomes, dataclasses.replace(reference, parallel=cuts, seq_quantum=128), world_size, reference=reference)


@combinations(
    name=["PP2xVPP2", "TP2xPP2+SP"],
    recompute={
        "full": ScheduleConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        "core_attn": ScheduleConfig(recompute_granularity="selective", recompute_modules=["core_attn"]),
        "layernorm and mlp": ScheduleConfig(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]),
    },
    quick={"name": ["PP2xVPP2"]},
    strength=1,
)
def test_recomputing_activations_changes_no_gradient(outcomes, name, recompute):
    kind, cuts, world_size = LAYOUTS[name]
    compare(outcomes, Case(kind=kind, parallel=cuts, schedule=recompute), world_size)


@combinations(name=["TP2xPP2+SP", "PP2xVPP2 tied", "CP2", "EP2xPP2"], quick={"name": ["PP2xVPP2 tied"]}, strength=1)
def test_the_current_weights_teach_alike_in_every_layout(outcomes, name):
    kind, cuts, world_size = LAYOUTS[name]
    compare(outcomes, Case(kind=kind, parallel=cuts, teacher="current"), world_size)


def test_a_shard_that_is_all_padding_changes_no_gradient(outcomes):
    """128 * TP2 = 256 rows for 61 tokens: the second rank holds padding only."""
    wide = {"make_vocab_size_divisible_by": 128}
    case = Case(parallel=parallel(tp=2), model_changes=wide)
    compare(outcomes, case, 2, reference=Case(extra_weightless=0))


MUTATIONS = {
    "backbone gradient x TP": "TP2+SP",
    "gradient x CP": "CP2",
    "gradient x num_microbatches": "PP2",
    "layer-norm all-reduce dropped": "TP2+SP",
    "padded column left in the softmax": "TP2",
    "teacher and student swapped": "PP2",
    "response position off by one": "PP2",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_parity_test_catches(outcomes, mutation):
    kind, cuts, world_size = LAYOUTS[MUTATIONS[mutation]]
    with pytest.raises(AssertionError, match=r"differs by|disagree|approx|=="):
        compare(outcomes, Case(kind=kind, parallel=cuts, mutation=mutation), world_size)


def compare_parameters(outcomes, case: Case, world_size: int, reference: Case | None = None) -> None:
    """Assert that every tensor has changed as much as on one rank.

    The tolerance is 1e-3 of the change, because only the last bits of a weight near 1 change.
    """
    reference = reference or dataclasses.replace(case, parallel=ParallelConfig(), extra_weightless=0)
    moved, expected = (
        {key: value - initial(key, value) for key, value in params.items()}
        for params in (outcomes(case, world_size)[2], outcomes(reference)[2])
    )
    assert all(change.norm() > 0 for change in expected.values()), "some parameter was never trained"
    worst, where = worst_difference(moved, expected)
    assert worst <= 1e-3, f"the change of {where} differs by {worst:.1e}"


def initial(key: str, like: torch.Tensor) -> torch.Tensor:
    return layouts.models.full_weight(key, like.shape)
