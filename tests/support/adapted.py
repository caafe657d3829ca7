# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One self-distillation step of a tiny model with adapters, or of the same model with the adapters merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import layouts
import models
import torch

from megatron_selfdistill.adapters.low_rank_adapters import LowRankAdapter, WithoutAdapters, add_adapters
from megatron_selfdistill.config import RecomputeConfig, ScheduleConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.loss.target import Divergence
from megatron_selfdistill.model.build import build_chunks, build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Teacher
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

ADAPTER = AdapterConfig(rank=3, alpha=0.3)
"""Adapters whose effect stays small beside the weights, since the factors of the tests are large."""


@dataclass(frozen=True)
class AdaptedCase:
    """A step of a model with adapters, whose teacher is the model without them."""

    case: layouts.Case
    adapter: AdapterConfig = field(default_factory=lambda: ADAPTER)
    merged: bool = False
    """Whether the factors are merged into the weights, which are trained in their place; the layout has one rank."""


def run(job: AdaptedCase) -> layouts.Outcome:
    """Run ``job`` on this rank; return the loss, the gradients of the first step, and the parameters at the end."""
    case = job.case
    model = models.model_config(case.kind, **case.model_changes)
    chunks, grid = models.build(model, case.parallel, optimizer=case.optimizer, schedule=case.schedule)
    add_adapters(chunks, job.adapter, grid)
    models.fill_from_names(chunks)
    if job.merged:
        plain = build_chunks(model, unwrapped(chunks[0]).config, grid, models.VOCAB_SIZE)
        models.fill_from_names(plain)
        merge(chunks, plain)
        chunks = plain
    student = wrap_for_training(chunks, case.optimizer)
    optimizer, scheduler = build_optimizer(student, case.optimizer, 10)
    frozen: Sequence[Any] = [WithoutAdapters(chunk) for chunk in student]
    if job.merged:
        copy = Teacher("frozen", student, lambda: build_chunks(model, unwrapped(plain[0]).config, grid, 61))
        models.fill_from_names(copy.chunks)
        frozen = copy.chunks
    batch = layouts.packed(case, grid)
    outcome: layouts.Outcome | None = None
    for _ in range(max(case.steps, 1)):
        for chunk in student:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        output = schedule.run(
            student,
            schedule.ScheduledTeacher(frozen),
            batch,
            token_losses.self_distillation(case.target, Divergence(case.divergence), fusion=case.fusion),
            grid,
            layouts.vocab_shard(student, grid),
            reference=layouts.reference(case, frozen),
            measurement=TokenMeasurement(case.target, chunk_tokens=5) if case.target.is_anchored else None,
        )
        if outcome is None:
            outcome = layouts.first_step(student, optimizer, output, batch, grid)
        if case.steps:
            scheduler.step(1)
            optimizer.step()
    assert outcome is not None
    if case.optimizer.use_distributed_optimizer:
        outcome.grads = {}
    if case.optimizer.overlap_param_gather:
        for chunk in student:
            chunk.start_param_sync(force_sync=True)
    outcome.params = layouts.shards(student, lambda p: p.detach())
    return outcome


def run_each(jobs: Sequence[AdaptedCase]) -> list[layouts.Outcome]:
    """Run one job after another on this rank; all jobs have the same layout."""
    return [run(job) for job in jobs]


@torch.no_grad()
def merge(adapted: Sequence[Any], plain: Sequence[Any]) -> None:
    """Add the product of the factors of ``adapted`` to the weights of ``plain``, the same model without adapters."""
    for chunk, target in zip(adapted, plain, strict=True):
        weights = dict(unwrapped(target).named_parameters())
        for name, module in unwrapped(chunk).named_modules():
            if isinstance(module, LowRankAdapter):
                weight = weights[f"{name.removesuffix('_adapter')}.weight"]
                weight += (module.scale * module.b.double() @ module.a.double()).to(weight)


@torch.no_grad()
def other_factors(chunks: Sequence[Any], seed: int) -> None:
    """Set the factors of ``chunks`` to those of ``seed``, and the weights to those that they always are."""
    models.fill_from_names(chunks, seed)
    parameters = [p for chunk in chunks for name, p in chunk.named_parameters() if "_adapter." in name]
    factors = [p.detach().clone() for p in parameters]
    models.fill_from_names(chunks)
    for parameter, factor in zip(parameters, factors, strict=True):
        parameter.copy_(factor)


def with_layout(job: AdaptedCase, **changes: Any) -> AdaptedCase:
    """Return ``job`` with changes of its case."""
    return dataclasses.replace(job, case=dataclasses.replace(job.case, **changes))


def recomputing(granularity: str) -> ScheduleConfig:
    """Return a schedule that recomputes complete layers, one at a time, or the attention."""
    if granularity == "full":
        return ScheduleConfig(recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1))
    return ScheduleConfig(recompute=RecomputeConfig(granularity="selective"))
