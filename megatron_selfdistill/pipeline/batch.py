# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pack the contexts of every replica into microbatches: the same number, of the same length, on every replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import (
    PackedBatch,
    PackingRules,
    length_quantum,
    pack,
    pad_to_count,
    required_seq_length,
)
from megatron_selfdistill.distributed.collectives import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.pipeline.schedule import microbatch_multiple


def pack_everywhere(
    contexts: Sequence[ContextPair],
    *,
    max_tokens: int,
    pair_order: str,
    with_teacher: bool,
    grid: RankGrid,
    with_reference: bool = False,
    seq_multiple: int | None = None,
) -> PackedBatch:
    """Return this replica's contexts, packed into sequences of at most ``max_tokens``.

    Every replica gets the same sequence length and number of microbatches: at least one of each role, and in total a
    multiple of `microbatch_multiple`.  A replica that has fewer microbatches gets weightless ones, and a replica
    without contexts gets only weightless ones.  ``pair_order=alternating`` packs student and teacher alike.  The
    sequence length is a multiple of ``seq_multiple``, which `model.fp8.token_multiple` returns.  On GPUs the length is
    rounded up to a multiple of `length_quantum`, which changes neither losses nor gradients.

    Collectives: two maxima over the data-parallel ranks. Raises: ValueError where one context alone exceeds
    ``max_tokens``.
    """
    paired = pair_order == "alternating"
    rules = PackingRules(max_tokens, grid.cp_size, grid.tp_size, paired, seq_multiple)
    quantum = length_quantum(max_tokens) if grid.device.type == "cuda" else None
    (seq_length,) = max_over_ranks([required_seq_length(contexts, rules, seq_quantum=quantum)], grid.dp_group)
    batch = pack(contexts, rules, seq_length=seq_length)
    counts = max(len(batch.student), 1), max(len(batch.teacher), 1)
    num_student, num_teacher = max_over_ranks(counts, grid.dp_group)
    num_student, run_by_teacher = raised_to_multiple(
        num_student,
        num_teacher if with_teacher else 0,
        microbatch_multiple(grid),
        paired=paired,
        with_reference=with_reference,
    )
    return pad_to_count(batch, num_student, run_by_teacher if with_teacher else num_teacher)


def raised_to_multiple(
    num_student: int, num_teacher: int, multiple: int, *, paired: bool, with_reference: bool
) -> tuple[int, int]:
    """Return both numbers of microbatches, raised until a step runs a multiple of ``multiple`` microbatches.

    A reference reads the student's microbatches once more.  ``paired`` raises both numbers alike.
    """
    student_roles = 2 if with_reference else 1
    while (student_roles * num_student + num_teacher) % multiple:
        num_student += paired or not with_reference
        num_teacher += paired or with_reference
    return num_student, num_teacher


def over_last_stage(values: torch.Tensor, grid: RankGrid) -> torch.Tensor:
    """Sum ``values`` in place over context-parallel ranks, give all TP ranks the bits of TP rank 0, and return them.

    The ranks of one replica's last stage call it; each context-parallel rank holds a part of the values and zeros
    elsewhere. Collectives: a sum over CP, a broadcast over TP.
    """
    if grid.cp_size > 1:
        dist.all_reduce(values, group=grid.cp_group)
    if grid.tp_size > 1:  # each rank took its own sums, which need not have the same bits
        dist.broadcast(values, dist.get_global_rank(grid.tp_group, 0), group=grid.tp_group)
    return values
