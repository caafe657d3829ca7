# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The hidden states of teacher and reference, on their way to the student microbatches that need them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.target import unit_mix
from megatron_selfdistill.model.forward import states_at
from megatron_selfdistill.pipeline.device_batch import DeviceBatch, TeacherMicrobatch


@dataclass(frozen=True)
class KeptStates:
    """The states of the R response tokens of one student microbatch, ``[R, h / tp]`` each, on the device."""

    teacher: Tensor | None = None
    """The teacher's own states; None without a teacher, and where only the mix is needed."""
    reference: Tensor | None = None
    """The reference's states, where teacher and reference are projected apart, and where they are wanted anyway."""
    mix: Tensor | None = None
    """The states (w h_t + h_r) / (1 + w) of the mix, where one projection serves teacher and reference."""
    reference_entropy: Tensor | None = None
    """The reference's entropy [R] in nats, float64, where the target matches it."""

    def of_target(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the states of the mix and None; without a mix, those of the teacher and of the reference."""
        return (self.teacher, self.reference) if self.mix is None else (self.mix, None)


class TeacherHiddenStates:
    """The teacher's final hidden states at response positions: ``[R_j, h / tp]`` for each student microbatch j.

    The states of a student microbatch belong to the response tokens that this context-parallel rank's student holds, in
    the student's order; each tensor-parallel rank keeps a slice of the width, so that any choice of states is the same
    choice on all tensor-parallel ranks.  States beyond ``store_bytes`` rest in pinned host memory; neither direction
    waits for the device.

    With a reference, `add_reference` keeps the reference's states h_r beside the teacher's h_t.  Where both share one
    linear output layer, it replaces both by (w h_t + h_r) / (1 + w), whose projection is (w t + r) / (1 + w).

    Collectives, per teacher microbatch under context parallelism: one all-to-all that sends each state to the rank
    whose student holds the same response token.  No autograd.
    """

    def __init__(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> None:
        self.batch, self.grid, self.store_bytes = batch, grid, store_bytes
        self.width = hidden_size // grid.tp_size
        self.shelves: list[dict[str, list[_Part]]] = [defaultdict(list) for _ in batch.student]
        """The parts of every student microbatch by the field of `KeptStates` that they belong to."""
        self.reference_entropies: dict[int, Tensor] = {}
        self.bytes_on_device = 0

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep the response positions of teacher microbatch ``index``; ``hidden [s / cp (/ tp), 1, h]``."""
        microbatch = self.batch.teacher[index]
        states = self._slice(states_at(hidden, microbatch.positions.in_sequence, self.grid))
        if self.grid.cp_size > 1:
            states = self._exchange(microbatch, states)
        for route in microbatch.routes:
            chosen = states if route.chosen is None else states.index_select(0, route.chosen)
            self._keep(route.student_index, "teacher", chosen, route.place)

    def add_reference(
        self,
        index: int,
        states: Tensor,
        entropy: Tensor | None,
        *,
        mix_weight: float | Tensor | None,
        keep_teacher: bool,
        keep_reference: bool = False,
    ) -> None:
        """Keep the reference's ``states [R, 1, h]`` and ``entropy [R]`` of student microbatch ``index``.

        ``states`` are those of the teacher's response tokens, equal on all tensor-parallel ranks.  ``mix_weight``: the
        teacher's weight w, or the w of each token [R], with which the states of the mix, rounded once to their dtype,
        take the place of both models' states; ``keep_teacher`` and ``keep_reference`` keep a model's own states beside
        the mix.  None keeps both models' states.
        """
        theirs = self._slice(states)
        if entropy is not None:
            self.reference_entropies[index] = entropy
        if mix_weight is None or keep_reference:
            self._keep(index, "reference", theirs)
        if mix_weight is None:
            return
        teacher = self._take(index, "teacher", theirs.dtype)
        self._keep(index, "mix", unit_mix(theirs, teacher, mix_weight).to(theirs.dtype))
        if keep_teacher:
            self._keep(index, "teacher", teacher)

    def take(self, index: int, dtype: torch.dtype) -> KeptStates:
        """Return all states of student microbatch ``index``, and forget them.

        Raises: RuntimeError where a teacher microbatch with some of its response tokens has not run.
        """
        kept = set(self.shelves[index])
        taken = {name: self._take(index, name, dtype) for name in (kept if "mix" in kept else kept | {"teacher"})}
        return KeptStates(**taken, reference_entropy=self.reference_entropies.pop(index, None))

    def at_full_width(self, block: Tensor) -> Tensor:
        """Return the states ``[R, 1, h]`` of which every tensor-parallel rank holds a slice ``block [R, h / tp]``."""
        states: Tensor = gather_from_tensor_model_parallel_region(block, group=self.grid.tp_group)
        return states.unsqueeze(1)

    def _slice(self, states: Tensor) -> Tensor:
        """Return this rank's slice ``[R, h / tp]`` of the width of ``states [R, 1, h]``."""
        return states.squeeze(1).narrow(1, self.grid.tp_rank * self.width, self.width).contiguous()

    def _take(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        size, parts = self.batch.num_states[index], self.shelves[index].pop(name, [])
        self.bytes_on_device -= sum(part.states.nbytes for part in parts if part.on_device)
        if sum(len(part.states) for part in parts) != size:
            raise RuntimeError(f"student microbatch {index} came before the {name}'s microbatches with its responses")
        loaded = [(part.states.to(self.grid.device, non_blocking=True), part.place) for part in parts]
        if len(loaded) == 1 and loaded[0][1] is None:
            return loaded[0][0]
        block = torch.empty(size, self.width, dtype=dtype, device=self.grid.device)
        for states, place in loaded:
            assert place is not None, "a part that is everything is the only one"
            block.index_copy_(0, place, states)
        return block

    def _keep(self, index: int, name: str, states: Tensor, place: Tensor | None = None) -> None:
        on_device = self.bytes_on_device + states.nbytes <= self.store_bytes
        if on_device:
            self.bytes_on_device += states.nbytes
        else:
            on_host = torch.empty(states.shape, dtype=states.dtype, device="cpu", pin_memory=True)
            states = on_host.copy_(states, non_blocking=True)
        self.shelves[index][name].append(_Part(states, place, on_device))

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


class _Part(NamedTuple):
    """The states [n, h / tp] of some or all of a student microbatch's R tokens."""

    states: Tensor
    place: Tensor | None
    """The places [n] among the R; None for all in order."""
    on_device: bool
