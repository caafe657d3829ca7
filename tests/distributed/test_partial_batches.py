# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step in partial batches has the gradients of the same microbatches in one call of the schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import layouts
import models
import pytest
import torch
from layouts import ADAM, Case, joined
from models import parallel
from parity import LAYOUTS, case_of, compare, compare_parameters
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_selfdistill.compat.older_megatron import submodules_of
from megatron_selfdistill.config import ParallelConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.distributed.ranks import current_grid
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model.build import wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.next_token import next_token
from megatron_selfdistill.pipeline.partial_batches import Accumulated, PartialBatch

RECOMPUTED = RecomputeConfig(granularity="full", method="uniform", num_layers=1)


def in_partial_batches(case: Case) -> tuple[Case, Case]:
    """Return the case in partial batches, and with the microbatches of all partial batches in one call."""
    divided = dataclasses.replace(case, partial_batches=3)
    return divided, dataclasses.replace(divided, replays_partial_batches=True)


@combinations(name=list(LAYOUTS), quick={"name": ["TP2+SP", "PP2xVPP2"]}, strength=1)
def test_partial_batches_have_the_gradients_of_one_call(outcomes, name, record_property):
    """With a balancing loss of the router, whose weight no microbatch may change."""
    balanced = {"transformer": {"moe_aux_loss_coeff": 0.05}} if "moe" in LAYOUTS[name] else {}
    case, world_size = case_of(name, model_changes=balanced)
    divided, replayed = outcomes.of(in_partial_batches(case), world_size)
    record_property("worst relative difference", compare(divided, replayed))


KINDS: list[dict[str, Any]] = [
    {"pair_order": "alternating", "paired": True, "schedule": ScheduleConfig(recompute=RECOMPUTED)},
    {"target": Target("fixed", anchor="reference")},
    {"two_terms": True},
]


@pytest.mark.full
@pytest.mark.parametrize("options", KINDS, ids=["alternating, recomputed", "anchored", "two terms"])
def test_partial_batches_have_the_gradients_of_one_call_in_every_kind_of_step(outcomes, options):
    case, world_size = case_of("PP2", **options)
    compare(*outcomes.of(in_partial_batches(case), world_size))


OVERLAPS: list[dict[str, Any]] = [
    {"use_distributed_optimizer": True},
    {"overlap_grad_reduce": True},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
]


@pytest.mark.full
@combinations(cuts={"DP2": parallel(), "DP2xPP2": parallel(pp=2)})
def test_data_parallel_optimizers_take_partial_batches_as_one_call(outcomes, cuts):
    """The reduction that overlaps with the backward pass begins in the last partial batch only."""
    case = Case(kind="shallow", parallel=cuts, steps=2, optimizer=ADAM)
    cases = [dataclasses.replace(case, optimizer=dataclasses.replace(ADAM, **changes)) for changes in OVERLAPS]
    divided = [in_partial_batches(one)[0] for one in cases]
    *got, expected = outcomes.of([*divided, in_partial_batches(case)[1]], 2 * cuts.pipeline_model_parallel_size)
    for one in got:
        compare_parameters(one, expected)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "mutation"), [("DP2", "earlier partial batches not scaled"), ("TP2+SP", "partial batches reduced twice")]
)
def test_the_comparison_catches(outcomes, name, mutation):
    """Twice reduced over data-parallel ranks is the same as once, and over the ranks of SP it is not."""
    case, world_size = case_of(name)
    divided, replayed = in_partial_batches(case)
    [per_rank] = outcomes.per_rank([dataclasses.replace(divided, mutation=mutation)], world_size)
    with pytest.raises(AssertionError, match=r"differs by|approx"):
        compare(joined(per_rank), outcomes(replayed, world_size))


def test_the_divisor_is_an_estimate_until_the_last_partial_batch():
    first = PartialBatch(share=0.25, is_last=False).accumulated(100, 4)
    second = PartialBatch(first, share=0.5, is_last=False).accumulated(60, 2)
    last = PartialBatch(second).accumulated(7, 1)
    assert first == Accumulated(100, 400, 100, 4) and second == Accumulated(160, 400, 100, 4)
    assert last == Accumulated(167, 167, 100, 4)


def called(case: Case) -> tuple[list[Any], Any, Callable[..., Any]]:
    """Return a student, its batch, and a function that runs a batch through the schedule."""
    chunks, grid = models.build(models.model_config(case.kind), case.parallel, optimizer=case.optimizer)
    student = wrap_for_training(chunks, case.optimizer)

    def call(batch: Any, partial_batch: PartialBatch | None = None, loss: Any = next_token) -> Any:
        vocab = layouts.vocab_shard(student, grid)
        return schedule.run(student, None, batch, loss, grid, vocab, partial_batch=partial_batch)

    return student, layouts.packed(case, grid), call


def main_grads(student: list[Any]) -> list[Tensor]:
    return [parameter.main_grad.clone() for parameter in student[0].parameters()]


def after_an_error_in_a_partial_batch() -> tuple[bool, bool]:
    """Return whether the configuration of the schedule is as before, and whether the next step has the same bits."""
    case, _ = case_of("DP2", optimizer=dataclasses.replace(ADAM, overlap_grad_reduce=True))
    student, batch, call = called(case)
    config = unwrapped(student[0]).config

    def gradients() -> list[Tensor]:
        student[0].zero_grad_buffer()
        call(batch)
        return main_grads(student)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError

    before = config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func
    expected = gradients()
    with pytest.raises(ArithmeticError):
        call(batch, PartialBatch(share=0.5, is_last=False), loss=broken)
    restored = before == (config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func)
    restored &= all(group.is_last_microbatch for group in student[0].bucket_groups)
    return restored, all(map(torch.equal, gradients(), expected))


def test_an_error_in_a_partial_batch_leaves_the_schedule_as_it_was(ranks):
    assert set(ranks.run(after_an_error_in_a_partial_batch, world_size=2)) == {(True, True)}


def test_a_partial_batch_without_tokens_ends_a_step_that_has_some_and_is_refused_before(ranks):
    assert ranks.run(partial_batches_without_tokens, world_size=1) == [(True, True)]


def partial_batches_without_tokens() -> tuple[bool, bool]:
    """Return whether an empty last partial batch keeps the step's gradients, and whether an empty first is refused."""
    case = Case(kind="shallow")
    student, batch, call = called(case)
    empty = layouts.packed_partial_batch(case, current_grid(case.parallel), layouts.contexts(), [])
    call(batch, PartialBatch())
    expected = main_grads(student)
    student[0].zero_grad_buffer()
    first = call(batch, PartialBatch(share=1.0, is_last=False))
    call(empty, PartialBatch(first.accumulated))
    kept = all(map(torch.equal, main_grads(student), expected))
    try:
        call(empty, PartialBatch(share=0.5, is_last=False))
    except schedule.NoResponseTokens:
        return kept, True
    return kept, False


class MarkedLinear(ColumnParallelLinear):
    """A layer with Transformer Engine's mark of the first microbatch, which the layer's forward pass removes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = True
        self.microbatches: list[bool] = []

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.microbatches.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        return super().forward(*arguments, **options)


def marked_spec(config: Any, vp_stage: int | None = None, **_: Any) -> Any:
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        submodules_of(spec.submodules.mlp).linear_fc1 = MarkedLinear
    return block


def marks_of_microbatches(cuts: ParallelConfig) -> list[list[bool]]:
    """Return the marks of a layer's microbatches in three partial batches and in the next step, by call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "layer_spec", marked_spec)
        student, batch, call = called(Case(kind="gqa", parallel=cuts))
    for chunk in student:
        unwrapped(chunk).config.use_kitchen = True  # one of the kinds of quantisation for which Megatron sets the mark
    layer = next(layer for layer in student[0].modules() if isinstance(layer, MarkedLinear))
    marks, output = [], None
    for share, is_last in ((0.5, False), (0.9, False), (1.0, True), (1.0, True)):
        earlier = output.accumulated if output and len(marks) < 3 else None
        before = len(layer.microbatches)
        output = call(batch, PartialBatch(earlier, share=share, is_last=is_last))
        marks.append(layer.microbatches[before:])
    return marks


@pytest.mark.parametrize("cuts", [parallel(), parallel(pp=2, vpp=2)], ids=["one rank", "PP2xVPP2"])
def test_only_the_first_microbatch_of_a_step_is_marked_as_the_one_that_overwrites_gradients(ranks, cuts):
    """A layer of Transformer Engine would else overwrite the gradients of the partial batches before."""
    for marks in ranks.run(marks_of_microbatches, cuts, world_size=cuts.pipeline_model_parallel_size):
        assert all(len(of_call) > 1 for of_call in marks)
        assert [of_call[0] for of_call in marks] == [True, False, False, True]
        assert not any(mark for of_call in marks for mark in of_call[1:])
