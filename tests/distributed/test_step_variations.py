# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step has the same gradient with any optimizer, order of pairs, packing, padding, recomputation and teacher."""

from __future__ import annotations

import dataclasses

import pytest
from layouts import ADAM, Case
from models import parallel
from parity import case_of, compare, compare_parameters, reference_of
from tiers import combinations

from megatron_selfdistill.config import RecomputeConfig, ScheduleConfig
from megatron_selfdistill.model.forward import Fusion

OVERLAPS = [
    {"use_distributed_optimizer": True},
    {"overlap_grad_reduce": True},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
]


@pytest.mark.full
@combinations(cuts={"DP2": parallel(), "DP2xPP2": parallel(pp=2)})
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


@combinations(name=["TP2+SP", "CP2", "EP2"], quick={"name": ["CP2"]}, strength=1)
def test_gradients_do_not_depend_on_padding_to_a_quantum_of_lengths(outcomes, name):
    case, world_size = case_of(name, max_tokens=300, extra_weightless=0)
    compare(outcomes(dataclasses.replace(case, seq_quantum=128), world_size), outcomes(reference_of(case)))


RECOMPUTED = [
    RecomputeConfig(granularity="full", method="uniform", num_layers=1),
    RecomputeConfig(granularity="selective", modules=["core_attn"]),
    RecomputeConfig(granularity="selective", modules=["layernorm", "mlp"]),
]


@pytest.mark.full
@pytest.mark.parametrize("name", ["PP2xVPP2", "TP2xPP2+SP"])
def test_recomputing_activations_changes_no_gradient(outcomes, name):
    case, world_size = case_of(name)
    cases = [dataclasses.replace(case, schedule=ScheduleConfig(recompute=it)) for it in RECOMPUTED]
    for got in outcomes.of(cases, world_size):
        compare(got, outcomes(reference_of(case)))


@pytest.mark.full
@combinations(name=["TP2xPP2+SP", "PP2xVPP2 tied", "CP2", "EP2xPP2"])
def test_the_current_weights_teach_alike_in_every_layout(outcomes, name):
    case, world_size = case_of(name, teacher="current")
    compare(outcomes(case, world_size), outcomes(reference_of(case)))


REACHED = ["TP2xPP2+SP", "PP2xVPP2", "CP2", "CP2xPP2", "EP2xPP2"]


@combinations(name=REACHED, divergence=["forward_kl", "reverse_kl", "jsd"], quick={"name": ["CP2"]}, strength=1)
def test_weights_by_reach_give_the_same_gradients_in_every_layout_and_every_cut_into_chunks(outcomes, name, divergence):
    case, world_size = case_of(name, reaches=True, divergence=divergence)
    alone = outcomes(reference_of(case))
    fused = [dataclasses.replace(case, fusion=Fusion(mode, 1)) for mode in ("low_memory", "keep_gradient")]
    for got in outcomes.of([case, *fused], world_size):
        compare(got, alone)
    plain = outcomes(dataclasses.replace(reference_of(case), reaches=False))
    assert plain[0].loss == pytest.approx(alone[0].loss, rel=1e-5), "the divergence is logged without its weights"
    assert plain[0].grad_norm != pytest.approx(alone[0].grad_norm, rel=0.01)
