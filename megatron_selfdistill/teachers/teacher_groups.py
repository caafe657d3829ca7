# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The batch of a step as several partial batches, one for each teacher that its contexts name.

The frozen copy on the device has the weights of one teacher at a time, so the schedule runs once per teacher, and the
gradients add up (pipeline/partial_batches.py).  The order is that of the names.

A response with several teachers is in the batch of each of them.  The loss of its tokens is the sum of the divergences
from their targets, weighted by the shares s, which add up to 1::

    loss = sum over the responses and their teachers of s D / N     N: the response tokens of the step, each once
         = sum of (s N' / N) D / N'                                 N': those of all batches, which the schedule counts

Where the teachers of a response teach as their product, it is in one batch alone, with all responses of these teachers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.integers import gather_integers
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import SharedTokens
from megatron_selfdistill.metrics.step import holds_tokens, over_all_ranks, token_values
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.sources.moved_contexts import chosen
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.teachers.teachers_config import product_of

Reading = tuple[int, TeacherPrompt]
"""The index of a context in its batch, and one of its teachers."""


def by_teacher(
    batch: StepBatch, teachers: Collection[str], grid: RankGrid, *, joins: bool = False
) -> Iterator[StepBatch]:
    """Yield the batch of a step in one batch per teacher that any replica's contexts name.

    ``teachers``: the names of all teachers.  All ranks yield as many batches; a replica's batch may have no contexts.
    Problems and responses, of which the metrics count all, stay with the first one.  A batch without any contexts
    becomes one of the first teacher.  ``joins``: whether the teachers of a context teach as their product; its batch
    has the name `product_of` theirs.
    Collectives: one `gather_integers` over the data-parallel ranks, and with ``joins`` one all_gather_object.
    Raises: ValueError for a context that names no teacher.
    """
    names = sorted(teachers)
    if joins:
        products = {_product(context) for context in batch.contexts}
        names = sorted({*names, *(name for part in gather_objects(products, grid.dp_group) for name in part)})
    read = _readings(batch.contexts, names, joins)
    tokens = [sum(len(batch.contexts[i].response) for i, _ in readings) for readings in read]
    own = [sum(batch.response_lengths), *map(len, read), *tokens]
    num_once, *totals = [sum(column) for column in zip(*gather_integers(own, grid.dp_group), strict=True)]
    num_contexts, num_tokens = totals[: len(names)], totals[len(names) :]
    several = sum(num_tokens) / num_once if num_once and num_once != sum(num_tokens) else None
    named = [index for index, number in enumerate(num_contexts) if number] or [0]
    done = 0
    for index, following in zip(named, [*named[1:], named[0]], strict=True):
        done += num_tokens[index]
        group = _group(batch, read[index], several, grid, joins)
        if index != named[0]:
            group = replace(group, problems=(), responses=())
        is_last = index == named[-1]
        share = 1.0 if is_last else done / (sum(num_tokens) or 1)
        group = replace(group, teacher=names[index], next_teacher=names[following], share=share)
        yield replace(group, ends_step=is_last)


def _product(context: ContextPair) -> str:
    return product_of(one.teacher for one in context.of_teachers) or context.teacher


def _readings(contexts: Sequence[ContextPair], teachers: Sequence[str], joins: bool) -> list[list[Reading]]:
    """Return the contexts that each of the ``teachers`` reads.  Raises: ValueError for an unknown teacher."""
    read: dict[str, list[Reading]] = {name: [] for name in teachers}
    for index, context in enumerate(contexts):
        whole = TeacherPrompt(_product(context), 1.0, context.teacher_prompt, context.control_prompts)
        for one in (whole,) if joins else context.of_teachers or (whole,):
            if one.teacher not in read:
                raise ValueError(
                    f"the context of problem {context.problem_id!r} names the teacher {one.teacher!r}, expected one of "
                    f"{', '.join(teachers)}"
                )
            read[one.teacher].append((index, one))
    return list(read.values())


def _group(
    batch: StepBatch, readings: Sequence[Reading], several: float | None, grid: RankGrid, joins: bool
) -> StepBatch:
    """Return the batch of one teacher; ``several``: N' / N, or None if no response of the step is in several batches.

    The contexts of a product keep all their teachers.
    """
    is_whole = several is None and (joins or not any(context.of_teachers for context in batch.contexts))
    if is_whole and len(readings) == len(batch.contexts):
        return batch
    group = chosen(batch, [index for index, _ in readings], grid.device)
    contexts = [
        replace(
            it,
            teacher=one.teacher,
            teacher_prompt=one.prompt,
            control_prompts=one.control_prompts,
            of_teachers=it.of_teachers if joins else (),
        )
        for it, (_, one) in zip(group.contexts, readings, strict=True)
    ]
    group = replace(group, contexts=contexts)
    if several is None:
        return group
    factors = torch.tensor([one.share * several for _, one in readings], dtype=torch.float64)
    of_tokens = factors.repeat_interleave(torch.tensor(group.response_lengths, dtype=torch.int64))
    shared = SharedTokens(to_device(of_tokens, grid.device), group.token_coefficients)
    return replace(group, token_coefficients=shared)


def teacher_metrics(outputs: Sequence[tuple[str, StepOutput]], grid: RankGrid) -> dict[str, float]:
    """Return what each teacher's tokens of a step say of this teacher, under flat keys, equal on all ranks.

    ``outputs``: the name of the teacher and the results of each partial batch, with the same names on all ranks.
    docs/metrics.md defines the keys, which have the names of the teachers.

    A token with several teachers counts for each of them.  Collectives: those of `over_all_ranks`.
    """
    keys, names = ("tokens/response", "loss/mean", "measured", "top1_agreement"), sorted({name for name, _ in outputs})
    sums = torch.zeros(len(names), len(keys), dtype=torch.float64, device=grid.device)
    for name, output in outputs:
        if output.stats is not None and holds_tokens(grid):
            values = token_values(output, None)
            for place, key in enumerate(keys):
                sums[names.index(name), place] += values[key].sum() if key in values else 0.0
    totals, _ = over_all_ranks(sums.flatten(), sums.new_full((1,), -math.inf), grid)
    metrics: dict[str, float] = {}
    for index, name in enumerate(names):
        tokens, loss, measured, agreement = totals[len(keys) * index :][: len(keys)]
        metrics |= {f"teacher_tokens/{name}": tokens, f"teacher_loss/{name}": loss / tokens}
        if measured:
            metrics[f"teacher_top1_agreement/{name}"] = agreement / measured
    return metrics
