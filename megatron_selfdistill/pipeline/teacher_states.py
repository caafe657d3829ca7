# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teacher's hidden states, on their way from a teacher microbatch to the student microbatches that need them.

With a reference, the reference's microbatches turn these states into the states of the mix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.forward import states_at
from megatron_selfdistill.pipeline.device_batch import DeviceBatch, RoutedStates, TeacherMicrobatch


class TeacherHiddenStates:
    """The teacher's final hidden states at response positions: ``[R_j, h / tp]`` for each student microbatch j.

    The states of a student microbatch belong to the response tokens that this context-parallel rank's student holds, in
    the student's order; each tensor-parallel rank keeps a slice of the width, so that any choice of states is the same
    choice on all tensor-parallel ranks.  States beyond ``store_bytes`` rest in pinned host memory; neither direction
    waits for the device.

    With a reference, `mix` replaces the teacher's states h_t by (w h_t + h_r) / (1 + w).  Teacher and reference share
    one linear output layer, so the projection of these states is (w t + r) / (1 + w).

    Collectives, per teacher microbatch under context parallelism: one all-to-all that sends each state to the rank
    whose student holds the same response token.  No autograd.
    """

    def __init__(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> None:
        self.batch, self.grid, self.store_bytes = batch, grid, store_bytes
        self.width = hidden_size // grid.tp_size
        self.shelves = [_Shelf() for _ in batch.student]
        self.bytes_on_device = 0

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep the response positions of teacher microbatch ``index``; ``hidden [s / cp (/ tp), 1, h]``."""
        microbatch = self.batch.teacher[index]
        states = states_at(hidden, microbatch.positions.in_sequence, self.grid)
        states = states.squeeze(1).narrow(1, self.grid.tp_rank * self.width, self.width).contiguous()
        if self.grid.cp_size > 1:
            states = self._exchange(microbatch, states)
        for route in microbatch.routes:
            self._keep(route, states if route.chosen is None else states.index_select(0, route.chosen))

    def mix(self, index: int, reference_states: Tensor, teacher_weight: float, *, keep_teacher: bool) -> None:
        """Replace the teacher's states of student microbatch ``index`` by the mix's, rounded once to their dtype.

        ``reference_states [R, 1, h]``: the reference's states of the same response tokens, equal on all
        tensor-parallel ranks.  ``keep_teacher``: whether `take_teacher` will ask for the teacher's own states.
        """
        theirs = reference_states.squeeze(1).narrow(1, self.grid.tp_rank * self.width, self.width)
        teacher = self.take_slice(index, theirs.dtype)
        mixed = torch.add(theirs.float(), teacher, alpha=teacher_weight).div_(1 + teacher_weight).to(theirs.dtype)
        self._keep(RoutedStates(index, None, None), mixed)
        if keep_teacher:
            self.shelves[index].teacher = teacher

    def take_teacher(self, index: int) -> Tensor:
        """Return this rank's slice ``[R, h / tp]`` of the teacher's own states, which `mix` has kept, and forget it."""
        teacher = self.shelves[index].teacher
        if teacher is None:
            raise RuntimeError(f"the teacher's own states of student microbatch {index} were not kept")
        self.shelves[index].teacher = None
        return teacher

    def at_full_width(self, block: Tensor) -> Tensor:
        """Return the states ``[R, 1, h]`` of which every tensor-parallel rank holds a slice ``block [R, h / tp]``."""
        states: Tensor = gather_from_tensor_model_parallel_region(block, group=self.grid.tp_group)
        return states.unsqueeze(1)

    def take_slice(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return this rank's slice of the width of those states, ``[R, h / tp]``, on the device, and forget it."""
        shelf, size = self.shelves[index], self.batch.num_states[index]
        self.shelves[index] = _Shelf()
        self.bytes_on_device -= shelf.bytes_on_device
        if shelf.num_states != size:
            raise RuntimeError(f"student microbatch {index} came before the teacher's microbatches with its responses")
        parts = [(part.to(self.grid.device, non_blocking=True), place) for part, place in shelf.parts]
        if len(parts) == 1 and parts[0][1] is None:
            return parts[0][0]
        block = torch.empty(size, self.width, dtype=dtype, device=self.grid.device)
        for part, place in parts:
            assert place is not None, "a part that is everything is the only one"
            block.index_copy_(0, place, part)
        return block

    def _keep(self, route: RoutedStates, states: Tensor) -> None:
        shelf = self.shelves[route.student_index]
        shelf.num_states += len(states)
        if self.bytes_on_device + states.nbytes > self.store_bytes:
            on_host = torch.empty(states.shape, dtype=states.dtype, device="cpu", pin_memory=True)
            states = on_host.copy_(states, non_blocking=True)
        else:
            shelf.bytes_on_device += states.nbytes
            self.bytes_on_device += states.nbytes
        shelf.parts.append((states, route.place))

    def _exchange(self, microbatch: TeacherMicrobatch, states: Tensor) -> Tensor:
        received = states.new_empty(sum(microbatch.receive_counts), states.size(1))
        assert microbatch.send_order is not None
        dist.all_to_all_single(
            received,
            states.index_select(0, microbatch.send_order),
            microbatch.receive_counts,
            microbatch.send_counts,
            group=self.grid.cp_group,
        )
        return received


@dataclass
class _Shelf:
    """The states that are kept for one student microbatch."""

    parts: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Pairs of states [n, h / tp] and their places [n] among the R of the microbatch; None for all in order."""
    num_states: int = 0
    bytes_on_device: int = 0
    teacher: Tensor | None = None
    """The teacher's own states [n, h / tp] beside those of the mix; None where nobody needs them."""
