# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pack the contexts of every replica into microbatches: the same number, of the same length, on every replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.distributed as dist

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.data.budgets import STUDENT_PASSES, StepPlan, budgets_of, cheapest, counts_by_budget
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import (
    PackedBatch,
    PackingRules,
    length_quantum,
    pack,
    pad_to_count,
    padded_lengths,
    required_seq_length,
)
from megatron_selfdistill.data.placement import placed
from megatron_selfdistill.distributed.collectives import gather_integers, max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.fp8 import token_multiple
from megatron_selfdistill.pipeline.schedule import microbatch_multiple


@dataclass(frozen=True)
class Packing:
    """How the contexts of a step become microbatches; equal on all ranks."""

    max_tokens: int
    """Largest number of tokens of a microbatch."""
    pair_order: str
    """The order of the microbatches; "alternating" packs student and teacher alike."""
    with_teacher: bool
    """Whether the step runs the teacher's microbatches."""
    with_reference: bool = False
    """Whether a reference reads the student's microbatches, too."""
    seq_multiple: int | None = None
    """The number of which the length of a microbatch is a multiple (`model.fp8.token_multiple`); None is 1."""
    attention_tokens: int | None = None
    """The length of a context whose attention takes as long as everything else; None leaves attention out."""

    @classmethod
    def of_model(
        cls,
        config: TransformerConfig,
        *,
        max_tokens: int,
        pair_order: str,
        with_teacher: bool,
        with_reference: bool = False,
    ) -> Packing:
        """Return the packing for the layers of a model.

        ``attention_tokens`` is 12 h: a layer of width h takes 24 h^2 FLOPs per token, and its causal attention 2 h L
        per token of a context of L tokens (Narayanan et al. 2021, arXiv 2104.04473, appendix, where no mask is causal).
        """
        return cls(
            max_tokens,
            pair_order,
            with_teacher,
            with_reference,
            seq_multiple=token_multiple(config),
            attention_tokens=12 * config.hidden_size,
        )

    @property
    def passes(self) -> tuple[int, int]:
        """The times that a token takes in the student's microbatches and in the teacher's, in forward passes."""
        return STUDENT_PASSES + self.with_reference, int(self.with_teacher)

    @property
    def is_paired(self) -> bool:
        """Whether microbatch i of student and teacher has the same contexts."""
        return self.pair_order == "alternating"

    def rules(self, grid: RankGrid) -> PackingRules:
        """Return the sizes of microbatches in a layout."""
        return PackingRules(self.max_tokens, grid.cp_size, grid.tp_size, self.is_paired, self.seq_multiple)

    def quantum(self, grid: RankGrid) -> int | None:
        """Return the `length_quantum` of a GPU; None on a CPU."""
        return length_quantum(self.max_tokens) if grid.device.type == "cuda" else None

    def attention(self, student_length: int, teacher_length: int) -> int:
        """Return the time of a context's attention, in forward passes of one token without attention."""
        student, teacher = self.passes
        squares = student * student_length**2 + teacher * teacher_length**2
        return squares // self.attention_tokens if self.attention_tokens else 0

    def costs(self, student_length: int, teacher_length: int) -> tuple[int, ...]:
        """Return the costs of a context for `data.placement.placed`: the tokens of each role, then its whole time."""
        student, teacher = self.passes
        time = student * student_length + teacher * teacher_length + self.attention(student_length, teacher_length)
        return student_length, teacher_length * self.with_teacher, time

    def needs(self, lengths: Sequence[tuple[int, int]], budgets: Sequence[int], rules: PackingRules) -> list[int]:
        """Return the numbers of a replica with contexts of these ``lengths`` from which `step_time` takes the maxima.

        ``lengths``: those of the student's and the teacher's context, padded.
        """
        counts = counts_by_budget([s for s, _ in lengths], [t for _, t in lengths], rules, budgets)
        return [*counts, sum(self.attention(*pair) for pair in lengths)]

    def step_time(self, needs: Sequence[int], budgets: Sequence[int], grid: RankGrid) -> float:
        """Return the time of a step, in any unit; ``needs``: the maxima of `needs` over the replicas."""
        return self.cheapest(budgets, needs[:-1], grid).cost + needs[-1]

    def cheapest(self, budgets: Sequence[int], counts: Sequence[int], grid: RankGrid) -> StepPlan:
        """Return the cheapest budget for the ``counts`` of all replicas, with the microbatches that the schedule runs.

        Without a teacher, ``num_teacher`` is 0.
        """

        def raised(num_student: int, num_teacher: int) -> tuple[int, int]:
            return raised_to_multiple(
                max(num_student, 1),
                max(num_teacher, 1) if self.with_teacher else 0,
                microbatch_multiple(grid),
                paired=self.is_paired,
                with_reference=self.with_reference,
            )

        return cheapest(budgets, counts, raised, self.passes)


def pack_everywhere(contexts: Sequence[ContextPair], packing: Packing, grid: RankGrid) -> PackedBatch:
    """Return this replica's contexts, packed into microbatches of at most ``packing.max_tokens`` tokens.

    Every replica gets the same length and number of microbatches: at least one of each role, and in total a multiple of
    `microbatch_multiple`.  The length is the one with which the step computes least (data/budgets.py).  A replica that
    has fewer microbatches gets weightless ones, and a replica without contexts gets only weightless ones.  On GPUs the
    length is rounded up to a multiple of `length_quantum`, which changes neither losses nor gradients.

    Collectives: two maxima over the data-parallel ranks. Raises: ValueError where one context alone exceeds
    ``max_tokens``.
    """
    rules, quantum = packing.rules(grid), packing.quantum(grid)
    budgets = budgets_of(rules, quantum)
    counts = counts_by_budget(*padded_lengths(contexts, rules), rules, budgets)
    plan = packing.cheapest(budgets, max_over_ranks(counts, grid.dp_group), grid)
    rules = replace(rules, max_tokens=plan.budget)
    (seq_length,) = max_over_ranks([required_seq_length(contexts, rules, seq_quantum=quantum)], grid.dp_group)
    batch = pack(contexts, rules, seq_length=seq_length)
    return pad_to_count(batch, plan.num_student, plan.num_teacher if packing.with_teacher else len(batch.teacher))


def placement_everywhere(contexts: Sequence[ContextPair], packing: Packing, grid: RankGrid) -> list[list[int]] | None:
    """Return the replica that shall train on each context, ``placement[r][i]`` for context i of replica r.

    All ranks get the same result (`data.placement.placed`).  It is None if all contexts should stay where they are,
    because there is one replica or the step would not become shorter.
    Collectives: over the data-parallel ranks, one `gather_integers` of the lengths and one maximum.  Raises: ValueError
    where one context alone exceeds ``max_tokens``.
    """
    if grid.dp_size == 1:
        return None
    rules = packing.rules(grid)
    own = zip(*padded_lengths(contexts, rules), strict=True)
    gathered = gather_integers([length for pair in own for length in pair], grid.dp_group)
    by_replica = [list(zip(numbers[::2], numbers[1::2], strict=True)) for numbers in gathered]
    lengths = [pair for part in by_replica for pair in part]
    homes = [replica for replica, part in enumerate(by_replica) for _ in part]
    replicas = placed([packing.costs(*pair) for pair in lengths], homes, grid.dp_size)
    given = [pair for pair, replica in zip(lengths, replicas, strict=True) if replica == grid.dp_rank]
    budgets = budgets_of(rules, packing.quantum(grid))
    needs = [packing.needs(pairs, budgets, rules) for pairs in (by_replica[grid.dp_rank], given)]
    maxima = max_over_ranks([*needs[0], *needs[1]], grid.dp_group)
    present, proposed = maxima[: len(needs[0])], maxima[len(needs[0]) :]
    if packing.step_time(proposed, budgets, grid) >= packing.step_time(present, budgets, grid):
        return None
    remaining = iter(replicas)
    return [list(islice(remaining, len(part))) for part in by_replica]


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
