# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tensors of a step besides weights and activations, which reach the device before the forward pass starts.

All microbatches of a step are known before the step, so their tensors travel in one copy, and the schedule never waits
for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.data.packing import Microbatch, PackedBatch, context_parallel_positions
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.forward import ModelInputs
from megatron_selfdistill.model.host_to_device import to_device_in_one_copy
from megatron_selfdistill.model.output_layer import ResponsePositions


@dataclass(frozen=True)
class StudentMicrobatch:
    """One microbatch of the student; this context-parallel rank holds the hidden states of R of its response tokens.

    The tokens of guided problems come last, so that both kinds of tokens are slices.
    """

    inputs: ModelInputs
    positions: ResponsePositions
    response_ids: Tensor
    """Index of each of the R tokens in ``PackedBatch.response_tokens``, [R] int64."""
    response_tokens: Tensor
    """Token ids of the R response tokens, [R] int64."""
    num_guided: int
    """Number of the R tokens that belong to guided problems."""


@dataclass(frozen=True)
class RoutedStates:
    """The part of a teacher microbatch's hidden states that one student microbatch needs, on this rank."""

    student_index: int
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

    @classmethod
    def of(cls, batch: PackedBatch, grid: RankGrid, *, with_teacher: bool, local_attention: bool) -> DeviceBatch:
        """Copy ``batch`` to this rank's device in one asynchronous copy.

        ``local_attention``: the result of `model.forward.uses_local_attention`.  Collectives: none.
        """
        held = [_held_by(microbatch, batch.guided, grid.cp_size, grid.cp_rank) for microbatch in batch.student]
        teacher = _teacher_microbatches(batch, grid, local_attention) if with_teacher else []
        on_host = cls(
            student=[
                StudentMicrobatch(
                    inputs=ModelInputs.on_host(microbatch, grid, local_attention=local_attention),
                    positions=ResponsePositions.on_host(positions, batch.seq_length // grid.cp_size, grid),
                    response_ids=ids,
                    response_tokens=batch.response_tokens[ids],
                    num_guided=int(batch.guided[ids].sum()),
                )
                for microbatch, (positions, ids) in zip(batch.student, held, strict=True)
            ],
            teacher=teacher,
            num_states=[len(ids) for _, ids in held],
        )
        return to_device_in_one_copy(on_host, grid.device)


def _teacher_microbatches(batch: PackedBatch, grid: RankGrid, local_attention: bool) -> list[TeacherMicrobatch]:
    """Return the teacher's microbatches as host tensors, with the route of each hidden state to the student."""
    total = len(batch.response_tokens)
    owner = torch.zeros(total, dtype=torch.int64)  # context-parallel rank of each token's student state
    student = torch.zeros(total, dtype=torch.int64)  # its student microbatch
    place = torch.zeros(total, dtype=torch.int64)  # its place among that microbatch's states on the owner
    sizes = []  # states of each student microbatch on this rank
    for index, microbatch in enumerate(batch.student):
        for rank in range(grid.cp_size):
            _, ids = _held_by(microbatch, batch.guided, grid.cp_size, rank)
            owner[ids], student[ids], place[ids] = rank, index, torch.arange(len(ids))
            if rank == grid.cp_rank:
                sizes.append(len(ids))
    microbatches = []
    for microbatch in batch.teacher:
        held = [_held_by(microbatch, batch.guided, grid.cp_size, rank) for rank in range(grid.cp_size)]
        positions, ids = held[grid.cp_rank]
        received = [theirs[owner[theirs] == grid.cp_rank] for _, theirs in held]
        microbatches.append(
            TeacherMicrobatch(
                inputs=ModelInputs.on_host(microbatch, grid, local_attention=local_attention),
                positions=ResponsePositions.on_host(positions, batch.seq_length // grid.cp_size, grid),
                send_order=torch.argsort(owner[ids], stable=True) if grid.cp_size > 1 else None,
                send_counts=torch.bincount(owner[ids], minlength=grid.cp_size).tolist(),
                receive_counts=[len(theirs) for theirs in received],
                routes=_routes(torch.cat(received), student, place, sizes),
            )
        )
    return microbatches


def _routes(received: Tensor, student: Tensor, place: Tensor, sizes: list[int]) -> list[RoutedStates]:
    """Return one route per student microbatch that needs any of the ``received`` response ids."""
    routes = []
    for index in student[received].unique().tolist():
        chosen = (student[received] == index).nonzero().flatten()
        places = place[received[chosen]]
        everything = len(chosen) == sizes[index] and torch.equal(places, torch.arange(len(places)))
        routes.append(
            RoutedStates(
                student_index=index,
                chosen=None if len(chosen) == len(received) else chosen,
                place=None if everything else places,
            )
        )
    return routes


def _held_by(microbatch: Microbatch, guided: Tensor, cp_size: int, cp_rank: int) -> tuple[Tensor, Tensor]:
    """Return the position in the rank's share and the response id of each response token whose state the rank holds.

    Tokens of guided problems come after the others, and otherwise positions rise.
    """
    positions, ids = microbatch.response_positions, microbatch.response_ids
    if cp_size > 1:
        held = context_parallel_positions(microbatch.cu_seqlens, cp_size, cp_rank)
        place = torch.full((len(microbatch.tokens),), -1, dtype=torch.int64)
        place[held] = torch.arange(len(held))
        positions = place[positions]
        positions, ids = positions[positions >= 0], ids[positions >= 0]
    order = torch.argsort(guided[ids], stable=True)
    return positions[order], ids[order]
