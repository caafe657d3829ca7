# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The budget of a step: the tokens that a microbatch may have, chosen so that the step computes least padding.

Every replica runs as many microbatches as the replica that needs most, all of one length.  If each of them had up to
``schedule.max_tokens`` tokens, contexts that fill 2.1 microbatches would make every replica compute 3 full ones.
Therefore a step takes the cheapest of several budgets between half of ``max_tokens`` and ``max_tokens``::

    budgets = budgets_of(rules)
    counts = all_reduce_max(counts_by_budget(student_lengths, teacher_lengths, rules, budgets))
    plan = cheapest(budgets, counts, raised)
    packed = pack(contexts, replace(rules, max_tokens=plan.budget), ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_selfdistill.data.packing import PackingRules, planned_sequences

STUDENT_PASSES = 3
"""The time of the student's microbatch in forward passes: the backward pass takes two."""
_MOST_BUDGETS = 33
_OVERHEAD = 1 / 64  # the time of a microbatch beside its tokens, as a share of the time of one with max_tokens tokens
_IMPOSSIBLE = 2**31  # microbatches of a budget that is shorter than a context


@dataclass(frozen=True)
class StepPlan:
    """The microbatches that every replica runs in a step."""

    budget: int
    """Largest number of tokens of a microbatch."""
    num_student: int
    num_teacher: int
    """Numbers of microbatches of student and teacher."""
    cost: float
    """Time of these microbatches without attention, in forward passes of one token."""


def budgets_of(rules: PackingRules, seq_quantum: int | None = None) -> list[int]:
    """Return the budgets that a step may have, the greatest first: ``rules.capacity``, and less down to half of it.

    All but the first are multiples of ``seq_quantum`` (`length_quantum`), so that the lengths of microbatches stay few.
    """
    capacity = rules.capacity
    unit = math.lcm(rules.length_multiple, seq_quantum or 1)
    step = -(-capacity // (2 * (_MOST_BUDGETS - 1) * unit)) * unit
    shorter = range((capacity - 1) // unit * unit, (capacity - 1) // 2, -step)
    return [capacity, *shorter]


def counts_by_budget(student: list[int], teacher: list[int], rules: PackingRules, budgets: Sequence[int]) -> list[int]:
    """Return the student's and the teacher's number of microbatches under each budget: ``2 * len(budgets)`` numbers.

    ``student``, ``teacher``: the lengths of a replica's contexts (`padded_lengths`).
    """
    longest = max(student + teacher, default=0)
    counts: list[int] = []
    for budget in budgets:
        if longest > budget:
            counts += [_IMPOSSIBLE, _IMPOSSIBLE]
        else:
            counts += map(len, planned_sequences(student, teacher, budget, paired=rules.paired))
    return counts


def cheapest(
    budgets: Sequence[int],
    counts: Sequence[int],
    raised: Callable[[int, int], tuple[int, int]],
    passes: tuple[int, int],
) -> StepPlan:
    """Return the budget with the least time of the step; of equally cheap ones the greatest.

    ``counts``: the maximum of `counts_by_budget` over the replicas.  ``raised``: returns the numbers of microbatches
    that the schedule runs for the numbers that are needed.  ``passes``: the times of a student's and of a teacher's
    microbatch, in forward passes.
    """
    overhead = _OVERHEAD * budgets[0]
    plans = []
    for budget, needed in zip(budgets, zip(counts[::2], counts[1::2], strict=True), strict=True):
        num_student, num_teacher = raised(*needed)
        time = passes[0] * num_student + passes[1] * num_teacher
        plans.append(StepPlan(budget, num_student, num_teacher, time * (budget + overhead)))
    return min(plans, key=lambda plan: plan.cost)
