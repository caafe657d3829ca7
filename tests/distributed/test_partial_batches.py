# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step in partial batches has the gradients of the same microbatches in one call of the schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import layouts
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import ADAM, Case, joined
from models import parallel
from parity import LAYOUTS, case_of, compare, compare_parameters
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_selfdistill.compat.older_megatron import submodules_of
from megatron_selfdistill.config import ParallelConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model.build import wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.next_token import next_token
from megatron_selfdistill.pipeline.partial_batches import Accumulated, PartialBatch

NUM_PARTIAL_BATCHES = 3


def in_partial_batches(case: Case) -> tuple[Case, Case]:
    """Return the case in partial batches, and with the microbatches of all partial batches in one call."""
    divided = dataclasses.replace(case, partial_batches=NUM_PARTIAL_BATCHES)
    return divided, dataclasses.replace(divided, replays_partial_batches=True)


@combinations(name=list(LAYOUTS), quick={"name": ["TP2+SP", "PP2xVPP2"]}, strength=1)
def test_partial_batches_have_the_gradients_of_one_call(outcomes, name, record_property):
    """With a balancing loss of the router, whose weight no microbatch may change."""
    case, world_size = case_of(
        name, model_changes={"transformer": {"moe_aux_loss_coeff": 0.05}} if "moe" in LAYOUTS[name] else {}
    )
    divided, replayed = outcomes.of(in_partial_batches(case), world_size)
    record_property("worst relative difference", compare(divided, replayed))


@pytest.mark.full
@combinations(
    options={
        "alternating": {"pair_order": "alternating", "paired": True},
        "anchored": {"target": Target("fixed", anchor="reference")},
        "two terms": {"two_terms": True},
        "recomputed": {
            "schedule": ScheduleConfig(recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1))
        },
    },
    quick={"options": ["anchored"]},
    strength=1,
)
def test_partial_batches_have_the_gradients_of_one_call_in_every_kind_of_step(outcomes, options):
    case, world_size = case_of("PP2", **options)
    compare(*outcomes.of(in_partial_batches(case), world_size))


OVERLAPS: dict[str, dict[str, Any]] = {
    "distributed": {"use_distributed_optimizer": True},
    "reduction": {"overlap_grad_reduce": True},
    "all": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


@combinations(cuts={"DP2": parallel(), "DP2xPP2": parallel(pp=2)}, quick={"cuts": ["DP2"]}, strength=1)
def test_data_parallel_optimizers_take_partial_batches_as_one_call(outcomes, cuts):
    """The reduction that overlaps with the backward pass begins in the last partial batch only."""
    case = Case(kind="shallow", parallel=cuts, steps=2, optimizer=ADAM)
    cases = [dataclasses.replace(case, optimizer=dataclasses.replace(ADAM, **changes)) for changes in OVERLAPS.values()]
    divided = [in_partial_batches(one)[0] for one in cases]
    *got, expected = outcomes.of([*divided, in_partial_batches(case)[1]], 2 * cuts.pipeline_model_parallel_size)
    for one in got:
        compare_parameters(one, expected)


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


@given(st.integers(1, 4000), st.integers(1, 64), st.integers(1, 10**9), st.integers(1, 4000))
def test_one_partial_batch_weighs_router_losses_as_before(num_microbatches, dp_size, num_tokens, num_weighted):
    """Bit for bit: both are the rounded quotient of integers."""
    whole = PartialBatch().accumulated(num_tokens, num_weighted)
    assert whole == Accumulated(num_tokens, num_tokens, num_tokens, num_weighted)
    factor = num_microbatches * dp_size * whole.first_tokens / (whole.first_microbatches * whole.divisor)
    assert factor == num_microbatches * dp_size / num_weighted


def test_the_divisor_is_an_estimate_until_the_last_partial_batch():
    first = PartialBatch(share=0.25, is_last=False).accumulated(100, 4)
    second = PartialBatch(first, share=0.5, is_last=False).accumulated(60, 2)
    last = PartialBatch(second).accumulated(7, 1)
    assert first == Accumulated(100, 400, 100, 4) and second == Accumulated(160, 400, 100, 4)
    assert last == Accumulated(167, 167, 100, 4)


class Broken(RuntimeError):
    """The error of a partial batch."""


def after_an_error_in_a_partial_batch() -> tuple[bool, bool]:
    """Return whether the configuration of the schedule is as before, and whether the next step has the same bits."""
    case, _ = case_of("DP2", optimizer=dataclasses.replace(ADAM, overlap_grad_reduce=True))
    model = models.model_config(case.kind)
    chunks, grid = models.build(model, ParallelConfig(), optimizer=case.optimizer)
    student = wrap_for_training(chunks, case.optimizer)
    config, vocab = unwrapped(student[0]).config, layouts.vocab_shard(student, grid)
    batch = layouts.packed(case, grid)

    def call(loss: Any, partial_batch: PartialBatch | None = None) -> None:
        schedule.run(student, None, batch, loss, grid, vocab, partial_batch=partial_batch)

    def gradients() -> list[Any]:
        for chunk in student:
            chunk.zero_grad_buffer()
        call(next_token)
        return [parameter.main_grad.clone() for parameter in student[0].parameters()]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise Broken

    before = config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func
    expected = gradients()
    with pytest.raises(Broken):
        call(broken, PartialBatch(share=0.5, is_last=False))
    restored = before == (config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func)
    restored &= all(group.is_last_microbatch for chunk in student for group in chunk.bucket_groups)
    return restored, all(one.equal(other) for one, other in zip(gradients(), expected, strict=True))


def test_an_error_in_a_partial_batch_leaves_the_schedule_as_it_was(ranks):
    assert set(ranks.run(after_an_error_in_a_partial_batch, world_size=2)) == {(True, True)}


def test_a_partial_batch_without_tokens_ends_a_step_that_has_some_and_is_refused_before(ranks):
    assert ranks.run(partial_batches_without_tokens, world_size=1) == [(True, True)]


def partial_batches_without_tokens() -> tuple[bool, bool]:
    """Return whether an empty last partial batch keeps the step's gradients, and whether an empty first is refused."""
    case = Case(kind="shallow")
    chunks, grid = models.build(models.model_config(case.kind), ParallelConfig(), optimizer=case.optimizer)
    student = wrap_for_training(chunks, case.optimizer)
    vocab, batch = layouts.vocab_shard(student, grid), layouts.packed(case, grid)
    empty = layouts.packed_partial_batch(case, grid, layouts.contexts(), [])

    def call(some: Any, partial_batch: PartialBatch) -> Any:
        return schedule.run(student, None, some, next_token, grid, vocab, partial_batch=partial_batch)

    def gradients() -> list[Any]:
        return [parameter.main_grad.clone() for parameter in student[0].parameters()]

    call(batch, PartialBatch())
    expected = gradients()
    student[0].zero_grad_buffer()
    first = call(batch, PartialBatch(share=1.0, is_last=False))
    call(empty, PartialBatch(first.accumulated))
    kept = all(one.equal(other) for one, other in zip(gradients(), expected, strict=True))
    try:
        call(empty, PartialBatch(share=0.5, is_last=False))
    except schedule.NoResponseTokens:
        return kept, True
    return kept, False


# -- layers that overwrite gradients -----


class OverwrittenGradient(torch.autograd.Function):
    """A product with a weight whose gradient the first microbatch writes and each later one adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, is_first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.is_first = is_first
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        weight.main_grad.copy_(of_weight) if ctx.is_first else weight.main_grad.add_(of_weight)
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.empty_like(weight), None


class MarkedLinear(ColumnParallelLinear):
    """A layer with Transformer Engine's mark of the first microbatch, which the layer's forward pass removes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = True
        self.microbatches: list[bool] = []

    def forward(self, x: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        self.microbatches.append(self.is_first_microbatch)
        is_first, self.is_first_microbatch = self.is_first_microbatch, False
        return OverwrittenGradient.apply(x, self.weight, is_first), None


def marked_spec(config: Any, vp_stage: int | None = None, **_: Any) -> Any:
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        submodules_of(spec.submodules.mlp).linear_fc1 = MarkedLinear
    return block


def partial_batches_of_layers_that_overwrite(cuts: ParallelConfig) -> tuple[list[list[bool]], float]:
    """Return the marks of a layer's microbatches by call, and the error of the gradients of three partial batches.

    The last call is a step of its own.
    """
    case = Case(kind="gqa", parallel=cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "layer_spec", marked_spec)
        chunks, grid = models.build(models.model_config(case.kind), cuts, optimizer=case.optimizer)
    for chunk in chunks:
        unwrapped(chunk).config.use_kitchen = True  # one of the kinds of quantisation for which Megatron sets the mark
    student = wrap_for_training(chunks, case.optimizer)
    vocab, batch = layouts.vocab_shard(student, grid), layouts.packed(case, grid)
    layers = [layer for chunk in student for layer in chunk.modules() if isinstance(layer, MarkedLinear)]
    marks = []

    def call(partial_batch: PartialBatch) -> Any:
        before = len(layers[0].microbatches)
        output = schedule.run(student, None, batch, next_token, grid, vocab, partial_batch=partial_batch)
        marks.append(layers[0].microbatches[before:])
        return output.accumulated

    def gradients() -> list[Tensor]:
        found = [layer.weight.main_grad.clone() for layer in layers]
        for chunk in student:
            chunk.zero_grad_buffer()
        return found

    first = call(PartialBatch(share=0.5, is_last=False))
    call(PartialBatch(call(PartialBatch(first, share=0.9, is_last=False))))
    in_partial_batches = gradients()
    call(PartialBatch())
    return marks, max(float((a - b).norm() / b.norm()) for a, b in zip(in_partial_batches, gradients(), strict=True))


@pytest.mark.parametrize("cuts", [parallel(), parallel(pp=2, vpp=2)], ids=["one rank", "PP2xVPP2"])
def test_only_the_first_microbatch_of_a_step_is_marked_so_that_no_partial_batch_overwrites_another(ranks, cuts):
    """The partial batches are three times the same responses, so their gradient is that of one call with them."""
    world_size = cuts.pipeline_model_parallel_size
    for marks, difference in ranks.run(partial_batches_of_layers_that_overwrite, cuts, world_size=world_size):
        assert all(len(of_call) > 1 for of_call in marks)
        assert [of_call[0] for of_call in marks] == [True, False, False, True]
        assert not any(mark for of_call in marks for mark in of_call[1:])
        assert difference < 12 * 2.0**-24, "three roundings of sums and of a scale each"
