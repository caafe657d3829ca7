# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A batch as several partial batches of its step, one for each teacher that its contexts name.

The frozen copy on the device has the weights of one teacher at a time, so the schedule runs once per teacher, and the
gradients add up as those of responses that stream (pipeline/token_losses.py).  The order is that of the names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.collectives import gather_integers
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.sources.moved_contexts import chosen
from megatron_selfdistill.sources.source import StepBatch


def by_teacher(batches: Iterator[StepBatch], teachers: Collection[str], grid: RankGrid) -> Iterator[StepBatch]:
    """Yield the batches of a step, each in one batch per teacher that any replica's contexts name.

    ``teachers``: the names of all teachers; without any the batches stay as they are.  All ranks yield as many batches;
    a replica's batch may have no contexts.  Problems and responses, of which the metrics count all, stay with the first
    one.  A batch without any contexts becomes one of the first teacher.
    Collectives: one `gather_integers` over the data-parallel ranks per batch.
    Raises: ValueError for a context that names no teacher.
    """
    before = 0.0
    for batch in batches:
        yield from _groups(batch, sorted(teachers), before, grid) if teachers else [batch]
        before = batch.share


def _groups(batch: StepBatch, teachers: Sequence[str], before: float, grid: RankGrid) -> Iterator[StepBatch]:
    """Yield the batches of `by_teacher` for one batch; ``before``: the share of the step before this batch."""
    places = [[i for i, it in enumerate(batch.contexts) if it.teacher == name] for name in teachers]
    _require_all_named(batch.contexts, places, teachers)
    tokens = [sum(len(batch.contexts[i].response) for i in group) for group in places]
    own = [*map(len, places), *tokens]
    totals = [sum(column) for column in zip(*gather_integers(own, grid.dp_group), strict=True)]
    num_contexts, num_tokens = totals[: len(teachers)], totals[len(teachers) :]
    named = [index for index, number in enumerate(num_contexts) if number] or [0]
    done = 0
    for index in named:
        done += num_tokens[index]
        part = done / (sum(num_tokens) or 1)
        group = chosen(batch, places[index], grid.device)
        if index != named[0]:
            group = replace(group, problems=(), responses=())
        is_last = index == named[-1]
        share = batch.share if is_last else before + (batch.share - before) * part
        yield replace(group, teacher=teachers[index], share=share, ends_step=batch.ends_step and is_last)


def _require_all_named(
    contexts: Sequence[ContextPair], places: Sequence[Sequence[int]], teachers: Sequence[str]
) -> None:
    """Raise ValueError unless every context is in one of the ``places``."""
    if sum(map(len, places)) < len(contexts):
        unknown = next(it for it in contexts if it.teacher not in teachers)
        raise ValueError(
            f"the context of problem {unknown.problem_id!r} names the teacher {unknown.teacher!r}, expected one of "
            f"{', '.join(teachers)}"
        )
