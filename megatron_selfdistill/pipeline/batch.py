# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pack the contexts of every replica into microbatches: the same number, of the same length, on every replica.

The budget of a step is the number of tokens that a microbatch may have; the step computes least padding.  Every replica
runs as many microbatches as the replica that needs most, all of one length.  If each of them had up to
``schedule.max_tokens`` tokens, contexts that fill 2.1 microbatches would make every replica compute 3 full ones.
Therefore a step takes the cheapest of several budgets between half of ``max_tokens`` and ``max_tokens``::

    budgets = budgets_of(rules)
    counts = all_reduce_max(counts_by_budget(student_lengths, teacher_lengths, rules, budgets))
    plan = packing.cheapest(budgets, counts, grid)
    packed = pack(contexts, replace(rules, max_tokens=plan.budget), ...)

All microbatches of a step are known before the step.  Therefore the tensors of a `DeviceBatch`, which are all tensors
besides weights and activations, travel to the device early, and the schedule never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)

from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import Microbatch, PackedBatch, PackingRules
from megatron_selfdistill.data.packing import (
    length_quantum,
    pack,
    pad_to_count,
    padded_lengths,
    planned_sequences,
    required_seq_length,
)
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.forward import ModelInputs, ResponsePositions

STUDENT_PASSES = 3
"""The time of the student's microbatch in forward passes: the backward pass takes two."""
_MOST_BUDGETS = 33
_OVERHEAD = 1 / 64  # the time of a microbatch beside its tokens, as a share of the time of one with max_tokens tokens
_IMPOSSIBLE = 2**31  # microbatches of a budget that is shorter than a context


@dataclass(frozen=True)
class Packing:
    """How the contexts of a step become microbatches; equal on all ranks."""

    max_tokens: int
    """Largest number of tokens of a microbatch."""
    pair_order: str | None
    """The order of the microbatches; "alternating" packs student and teacher alike.  With None the teacher comes first
    in steps of at most ``stored_tokens``; where a teacher's contexts are longer, this takes fewer microbatches."""
    with_teacher: bool
    """Whether the step runs the teacher's microbatches."""
    with_reference: bool = False
    """Whether a reference reads the student's microbatches, too."""
    seq_multiple: int | None = None
    """The number of which the length of a microbatch is a multiple (`token_multiple`); None is 1."""
    attention_tokens: int | None = None
    """The length of a context whose attention takes as long as everything else; None leaves attention out."""
    joins_turns: bool = False
    """Whether the turns of an episode share a segment (`PackingRules.joins_turns`)."""
    num_controls: int = 0
    """The number of controls of the target, for each of which the teacher reads each response once more."""
    stored_tokens: float = math.inf
    """The most response tokens of a replica whose states of the teacher may wait for the student."""

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
        sizes = self.max_tokens, grid.cp_size, grid.tp_size
        return PackingRules(*sizes, self.is_paired, self.seq_multiple, self.joins_turns, self.num_controls)

    def quantum(self, grid: RankGrid) -> int | None:
        """Return the `length_quantum` of a GPU; None on a CPU."""
        return length_quantum(self.max_tokens) if grid.device.type == "cuda" else None

    def cheapest(self, budgets: Sequence[int], counts: Sequence[int], grid: RankGrid) -> StepPlan:
        """Return the budget with the least time of the step, of equally cheap ones the greatest, and its microbatches.

        ``counts``: the maximum of `counts_by_budget` over the replicas.  Without a teacher, ``num_teacher`` is 0.
        """

        def raised(num_student: int, num_teacher: int) -> tuple[int, int]:
            return raised_to_multiple(
                max(num_student, 1),
                max(num_teacher, 1 + self.num_controls if self.is_paired else 1) if self.with_teacher else 0,
                microbatch_multiple(grid),
                paired=self.is_paired,
                with_reference=self.with_reference,
                num_readings=1 + self.num_controls,
            )

        overhead, plans = _OVERHEAD * budgets[0], []
        for budget, needed in zip(budgets, zip(counts[::2], counts[1::2], strict=True), strict=True):
            num_student, num_teacher = raised(*needed)
            time = self.passes[0] * num_student + self.passes[1] * num_teacher
            plans.append(StepPlan(budget, num_student, num_teacher, time * (budget + overhead)))
        return min(plans, key=lambda plan: plan.cost)


def _with_order(packing: Packing, contexts: Sequence[ContextPair], grid: RankGrid) -> Packing:
    if packing.pair_order is not None:
        return packing
    (most,) = max_over_ranks([sum(len(context.response) for context in contexts)], grid.dp_group)
    return replace(packing, pair_order="teacher_first" if most <= packing.stored_tokens else "alternating")


def pack_everywhere(contexts: Sequence[ContextPair], packing: Packing, grid: RankGrid) -> PackedBatch:
    """Return this replica's contexts, packed into microbatches of at most ``packing.max_tokens`` tokens.

    Every replica gets the same length and number of microbatches: at least one of each role, and in total a multiple of
    `microbatch_multiple`.  The length is the one with which the step computes least (pipeline/batch.py).  A replica
    that has fewer microbatches gets weightless ones, and a replica without contexts gets only weightless ones.  On GPUs
    the length is rounded up to a multiple of `length_quantum`, which changes neither losses nor gradients.

    Collectives: two maxima over the data-parallel ranks, and one more if the order is not given.  Raises: ValueError
    where one context alone exceeds ``max_tokens``.
    """
    packing = _with_order(packing, contexts, grid)
    rules, quantum = packing.rules(grid), packing.quantum(grid)
    budgets = budgets_of(rules, quantum)
    counts = counts_by_budget(*padded_lengths(contexts, rules), rules, budgets)
    plan = packing.cheapest(budgets, max_over_ranks(counts, grid.dp_group), grid)
    rules = replace(rules, max_tokens=plan.budget)
    (seq_length,) = max_over_ranks([required_seq_length(contexts, rules, seq_quantum=quantum)], grid.dp_group)
    batch = pack(contexts, rules, seq_length=seq_length)
    return pad_to_count(batch, plan.num_student, plan.num_teacher if packing.with_teacher else len(batch.teacher))


def microbatch_multiple(grid: RankGrid) -> int:
    """Return the divisor of the number of microbatches in a step: PP for the interleaved schedule, else 1."""
    return grid.pp_size if grid.virtual_pipeline_model_parallel_size else 1


def raised_to_multiple(
    num_student: int, num_teacher: int, multiple: int, *, paired: bool, with_reference: bool, num_readings: int = 1
) -> tuple[int, int]:
    """Return both numbers of microbatches, raised until a step runs a multiple of ``multiple`` microbatches.

    A reference reads the student's microbatches once more.  ``paired`` raises both numbers alike: a microbatch of the
    student has ``num_readings`` of the teacher.  A step without microbatches of a teacher stays without them.
    """
    while ((1 + with_reference) * num_student + num_teacher) % multiple:
        num_student += paired or not (with_reference and num_teacher)
        num_teacher += (num_readings if paired else with_reference) if num_teacher else 0
    return num_student, num_teacher


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
    return [capacity, *range((capacity - 1) // unit * unit, (capacity - 1) // 2, -step)]


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


@dataclass(frozen=True)
class StudentMicrobatch:
    """One microbatch of the student; this context-parallel rank holds the hidden states of R of its response tokens."""

    inputs: ModelInputs
    positions: ResponsePositions
    response_ids: Tensor
    """Index of each of the R tokens in ``PackedBatch.response_tokens``, [R] int64."""
    response_tokens: Tensor
    """Token ids of the R response tokens, [R] int64."""


@dataclass(frozen=True)
class RoutedStates:
    """The part of a teacher microbatch's hidden states that one student microbatch needs, on this rank."""

    student_index: int
    reading: int
    """The reading of these states: 0 for the teacher's own prompts, k for those of control k."""
    chosen: Tensor | None
    """Indices among the states that this rank receives, [n] int64; None for all states, in their order."""
    place: Tensor | None
    """Indices among the R states of the student microbatch, [n] int64; None for all states, in their order."""


@dataclass(frozen=True)
class TeacherMicrobatch:
    """One microbatch of the teacher, and the student microbatches that need its hidden states."""

    inputs: ModelInputs
    positions: ResponsePositions
    send_order: Tensor | None
    """Order in which this rank sends its states to the context-parallel ranks, [R] int64; None with one such rank."""
    send_counts: list[int]
    """Number of states that this rank sends to each context-parallel rank."""
    receive_counts: list[int]
    """Number of states that this rank receives from each context-parallel rank."""
    routes: list[RoutedStates]
    """The student microbatches that need the received states, and which states each needs."""


@dataclass(frozen=True)
class DeviceBatch:
    """A `PackedBatch` as this rank's schedule takes it, all tensors on the device."""

    student: list[StudentMicrobatch]
    teacher: list[TeacherMicrobatch]
    num_states: list[int]
    """R of each student microbatch, on this context-parallel rank."""
    num_controls: int = 0
    """The number of controls, of which the teacher reads each response, too."""

    @classmethod
    def of(cls, batch: PackedBatch, grid: RankGrid, *, with_teacher: bool, local_attention: bool) -> DeviceBatch:
        """Copy ``batch`` to this rank's device in one asynchronous copy.

        ``local_attention``: the result of `model.forward.uses_local_attention`.  Collectives: none.
        """
        held = [held_by(microbatch, grid.cp_size, grid.cp_rank) for microbatch in batch.student]
        on_host = cls(
            student=[
                StudentMicrobatch(
                    inputs=ModelInputs.on_host(microbatch, grid, local_attention=local_attention),
                    positions=ResponsePositions.on_host(positions, batch.seq_length // grid.cp_size, grid),
                    response_ids=ids,
                    response_tokens=batch.response_tokens[ids],
                )
                for microbatch, (positions, ids) in zip(batch.student, held, strict=True)
            ],
            teacher=teacher_microbatches(batch, batch, grid, local_attention) if with_teacher else [],
            num_states=[len(ids) for _, ids in held],
            num_controls=batch.num_controls,
        )
        return to_device(on_host, grid.device)


def teacher_microbatches(
    batch: PackedBatch, reading: PackedBatch, grid: RankGrid, local_attention: bool
) -> list[TeacherMicrobatch]:
    """Return the teacher's microbatches of ``reading`` as host tensors, with the route of each state to the student.

    ``batch``: with the student's microbatches of the same responses.
    """
    total = len(batch.response_tokens)
    owner = torch.zeros(total, dtype=torch.int64)  # context-parallel rank of each token's student state
    student = torch.zeros(total, dtype=torch.int64)  # its student microbatch
    place = torch.zeros(total, dtype=torch.int64)  # its place among that microbatch's states on the owner
    sizes = []  # states of each student microbatch on this rank
    for index, microbatch in enumerate(batch.student):
        for rank in range(grid.cp_size):
            _, ids = held_by(microbatch, grid.cp_size, rank)
            owner[ids], student[ids], place[ids] = rank, index, torch.arange(len(ids))
            if rank == grid.cp_rank:
                sizes.append(len(ids))
    microbatches = []
    for microbatch in reading.teacher:
        held = [held_by(microbatch, grid.cp_size, rank) for rank in range(grid.cp_size)]
        positions, _ = held[grid.cp_rank]
        owners = [owner[theirs % max(1, total)] for _, theirs in held]
        received = [theirs[to == grid.cp_rank] for (_, theirs), to in zip(held, owners, strict=True)]
        sent = owners[grid.cp_rank]
        microbatches.append(
            TeacherMicrobatch(
                inputs=ModelInputs.on_host(microbatch, grid, local_attention=local_attention),
                positions=ResponsePositions.on_host(positions, reading.seq_length // grid.cp_size, grid),
                send_order=torch.argsort(sent, stable=True) if grid.cp_size > 1 else None,
                send_counts=torch.bincount(sent, minlength=grid.cp_size).tolist(),
                receive_counts=[len(theirs) for theirs in received],
                routes=_routes(torch.cat(received), student, place, sizes),
            )
        )
    return microbatches


def _routes(received: Tensor, student: Tensor, place: Tensor, sizes: list[int]) -> list[RoutedStates]:
    """Return one route per reading of each student microbatch that needs any of the ``received`` response ids."""
    routes: list[RoutedStates] = []
    if not len(student):
        return routes
    of_token, reading = received % len(student), received // len(student)
    needed = reading * len(sizes) + student[of_token]
    for each in needed.unique().tolist():
        chosen = (needed == each).nonzero().flatten()
        places, index = place[of_token[chosen]], each % len(sizes)
        everything = len(chosen) == sizes[index] and torch.equal(places, torch.arange(len(places)))
        routes.append(
            RoutedStates(
                student_index=index,
                reading=each // len(sizes),
                chosen=None if len(chosen) == len(received) else chosen,
                place=None if everything else places,
            )
        )
    return routes


def held_by(microbatch: Microbatch, cp_size: int, cp_rank: int) -> tuple[Tensor, Tensor]:
    """Return the position in the rank's share and the response id of each response token whose state the rank holds.

    Positions rise.
    """
    positions, ids = microbatch.response_positions, microbatch.response_ids
    if cp_size == 1:
        return positions, ids
    held = context_parallel_positions(microbatch.cu_seqlens, cp_size, cp_rank)
    place = torch.full((len(microbatch.tokens),), -1, dtype=torch.int64)
    place[held] = torch.arange(len(held))
    positions = place[positions]
    return positions[positions >= 0], ids[positions >= 0]
