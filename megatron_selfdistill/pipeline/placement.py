# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Choose the replica that trains on each context, so that all data-parallel replicas compute equally much."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import padded_lengths, segments_of
from megatron_selfdistill.distributed.integers import gather_integers, max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.pipeline.batch import Packing, budgets_of, counts_by_budget


def placement_everywhere(contexts: Sequence[ContextPair], packing: Packing, grid: RankGrid) -> list[list[int]] | None:
    """Return the replica that trains on each context, ``placement[r][i]`` for context i of replica r.

    All ranks get the same result (`placed`), in which the contexts of a segment stay together.  It is None if all
    contexts should stay where they are, because the step would not become shorter.
    Collectives: over the data-parallel ranks, one `gather_integers` of the lengths and one maximum.  Raises: ValueError
    where one context alone exceeds ``max_tokens``.
    """
    rules = packing.rules(grid)
    student, teacher = padded_lengths(contexts, rules)
    readings = [teacher[k :: len(student)] for k in range(len(student))]
    own = zip(student, readings, map(len, segments_of(contexts, rules)), strict=True)
    gathered = gather_integers(
        [number for one, of_teacher, size in own for number in (one, *of_teacher, size)], grid.dp_group
    )
    width = 3 + packing.num_controls  # the student's length, those of the teacher's readings, the number of contexts
    by_replica = [[numbers[at : at + width - 1] for at in range(0, len(numbers), width)] for numbers in gathered]
    lengths = [segment for part in by_replica for segment in part]
    homes = [replica for replica, part in enumerate(by_replica) for _ in part]
    replicas = placed([_costs(packing, *segment) for segment in lengths], homes, grid.dp_size)
    given = [segment for segment, replica in zip(lengths, replicas, strict=True) if replica == grid.dp_rank]
    budgets = budgets_of(rules, packing.quantum(grid))
    needs = [_needs(packing, segments, rules, budgets) for segments in (by_replica[grid.dp_rank], given)]
    maxima = max_over_ranks([*needs[0], *needs[1]], grid.dp_group)
    present, proposed = maxima[: len(needs[0])], maxima[len(needs[0]) :]
    before, after = (packing.cheapest(budgets, most[:-1], grid).cost + most[-1] for most in (present, proposed))
    if after >= before:
        return None
    remaining = iter(replicas)
    sizes = [numbers[width - 1 :: width] for numbers in gathered]
    return [[replica for size in part for replica in [next(remaining)] * size] for part in sizes]


def placed(costs: Sequence[Sequence[int]], homes: Sequence[int], num_replicas: int) -> list[int]:
    """Return the replica of each context: its home where possible, so that few contexts travel.

    ``costs[i]``: the costs of context i in one or several units, of which the last one is its whole cost.
    ``homes[i]``: the replica that has context i.  The dearest context is placed first.  A context stays at home as long
    as no cost of its home exceeds an equal share of the global batch and the cost of the dearest context, which no
    placement can avoid.  Otherwise the context goes to the replica where the greatest share of the replica in the costs
    of the global batch is then least.  The result is deterministic.  Collectives: none.
    """
    totals = [sum(column) for column in zip(*costs, strict=True)]
    dearest = [max(column) for column in zip(*costs, strict=True)]
    bounds = [max(total, num_replicas * most) for total, most in zip(totals, dearest, strict=True)]
    loads = [[0] * len(totals) for _ in range(num_replicas)]
    replicas = list(homes)

    def with_cost(replica: int, cost: Sequence[int]) -> list[int]:
        return [load + more for load, more in zip(loads[replica], cost, strict=True)]

    def largest_share(replica: int, cost: Sequence[int]) -> float:
        return max(load / (total or 1) for load, total in zip(with_cost(replica, cost), totals, strict=True))

    for index in sorted(range(len(costs)), key=lambda i: -costs[i][-1]):
        cost, replica = costs[index], homes[index]
        if any(num_replicas * load > bound for load, bound in zip(with_cost(replica, cost), bounds, strict=True)):
            replica = min(range(num_replicas), key=lambda other: largest_share(other, cost))
        replicas[index], loads[replica] = replica, with_cost(replica, cost)
    return replicas


def _attention(packing: Packing, student_length: int, *teacher_lengths: int) -> int:
    """Return the time of a context's attention, in forward passes of one token without attention."""
    student, teacher = packing.passes
    squares = student * student_length**2 + teacher * sum(length**2 for length in teacher_lengths)
    return squares // packing.attention_tokens if packing.attention_tokens else 0


def _costs(packing: Packing, student_length: int, *teacher_lengths: int) -> tuple[int, ...]:
    """Return the costs of a context for `placed`: the tokens of each role, then its whole time."""
    student, teacher = packing.passes
    attention, teacher_length = _attention(packing, student_length, *teacher_lengths), sum(teacher_lengths)
    time = student * student_length + teacher * teacher_length + attention
    return student_length, teacher_length * packing.with_teacher, time


def _needs(
    packing: Packing, lengths: Sequence[Sequence[int]], rules: PackingRules, budgets: Sequence[int]
) -> list[int]:
    """Return the numbers of a replica with contexts of these ``lengths`` whose maxima give the time of a step.

    ``lengths``: those of the student's context and of the teacher's readings, padded.
    """
    student = [segment[0] for segment in lengths]
    teacher = [segment[k] for k in range(1, 2 + packing.num_controls) for segment in lengths]
    counts = counts_by_budget(student, teacher, rules, budgets)
    return [*counts, sum(_attention(packing, *segment) for segment in lengths)]
