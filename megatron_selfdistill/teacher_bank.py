# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teacher's hidden rows, from where a teacher microbatch leaves them to where the student needs them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_selfdistill.data.packing import Microbatch, PackedBatch, context_parallel_positions
from megatron_selfdistill.model.forward import rows_at
from megatron_selfdistill.parallel import Grid


class TeacherBank:
    """The teacher's final hidden states at response positions, one block ``[R_j, h / tp]`` per student microbatch j.

    A block's rows are those that this context-parallel rank's student holds, in its order; each tensor-parallel rank
    keeps a slice of the width, so that any choice of rows is the same choice on all of them.  Blocks
    beyond ``store_bytes`` rest in pinned host memory.
    Collectives, per teacher microbatch under context parallelism: one all-to-all that sends each row to the rank
    whose student holds the same response token.  No autograd.
    """

    def __init__(self, batch: PackedBatch, grid: Grid, hidden_size: int, store_bytes: float) -> None:
        self.batch, self.grid, self.store_bytes = batch, grid, store_bytes
        self.width = hidden_size // grid.tp_size
        total = len(batch.response_tokens)
        self.owner = torch.zeros(total, dtype=torch.int64)  # context-parallel rank of each token's student row
        self.block = torch.zeros(total, dtype=torch.int64)  # its student microbatch
        self.place = torch.zeros(total, dtype=torch.int64)  # its row in that microbatch's block
        self.sizes: list[int] = []
        for j, microbatch in enumerate(batch.student):
            for rank in range(grid.cp_size):
                _, ids = _response_rows_of(microbatch, grid.cp_size, rank)
                self.owner[ids], self.block[ids] = rank, j
                self.place[ids] = torch.arange(len(ids))
                if rank == grid.cp_rank:
                    self.sizes.append(len(ids))
        self.blocks: dict[int, Tensor] = {}

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep the rows of teacher microbatch ``index``; ``hidden [s / cp (/ tp), 1, h]``."""
        rows, ids = local_response_rows(self.batch.teacher[index], self.grid)
        hidden = rows_at(hidden, rows, self.grid)
        kept = hidden.squeeze(1).narrow(1, self.grid.tp_rank * self.width, self.width)
        kept, ids = self._exchange(index, kept, ids)
        for j in self.block[ids].unique().tolist():
            chosen = (self.block[ids] == j).nonzero().flatten()
            target = self._allocate(j, kept)
            target[self.place[ids[chosen]].to(target.device)] = kept[chosen.to(kept.device)].to(target.device)

    def take(self, index: int, dtype: torch.dtype) -> Tensor:
        """The rows of student microbatch ``index`` at full width, ``[R, 1, h]``; the block is freed."""
        block = self.take_slice(index, dtype)
        return gather_from_tensor_model_parallel_region(block, group=self.grid.tp_group).unsqueeze(1)

    def take_slice(self, index: int, dtype: torch.dtype) -> Tensor:
        """This rank's slice of their width, ``[R, h / tp]``, on the device; the block is freed."""
        block = self.blocks.pop(index, None)
        if block is None:
            if self.sizes[index]:
                raise RuntimeError(f"student microbatch {index} came before the teacher had read its responses")
            block = torch.empty(0, self.width, dtype=dtype, device=self.grid.device)
        return block.to(self.grid.device, non_blocking=True)

    def _allocate(self, index: int, like: Tensor) -> Tensor:
        if index not in self.blocks:
            shape = (self.sizes[index], like.size(1))
            on_device = sum(block.nbytes for block in self.blocks.values() if block.device == self.grid.device)
            needed = shape[0] * shape[1] * like.element_size()
            if on_device + needed > self.store_bytes:
                self.blocks[index] = torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=True)
            else:
                self.blocks[index] = torch.empty(shape, dtype=like.dtype, device=self.grid.device)
        return self.blocks[index]

    def _exchange(self, index: int, kept: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid.cp_size == 1:
            return kept, ids
        by_owner = torch.argsort(self.owner[ids], stable=True)
        send = torch.bincount(self.owner[ids], minlength=self.grid.cp_size).tolist()
        received = []
        for rank in range(self.grid.cp_size):
            _, theirs = _response_rows_of(self.batch.teacher[index], self.grid.cp_size, rank)
            received.append(theirs[self.owner[theirs] == self.grid.cp_rank])
        counts = [len(x) for x in received]
        out = kept.new_empty(sum(counts), kept.size(1))
        dist.all_to_all_single(out, kept[by_owner.to(kept.device)].contiguous(), counts, send, group=self.grid.cp_group)
        return out, torch.cat(received)


def local_response_rows(microbatch: Microbatch, grid: Grid) -> tuple[Tensor, Tensor]:
    """(row in this context-parallel rank's share, response id) of each response token whose hidden state it holds."""
    return _response_rows_of(microbatch, grid.cp_size, grid.cp_rank)


def _response_rows_of(microbatch: Microbatch, cp_size: int, cp_rank: int) -> tuple[Tensor, Tensor]:
    """(row in that rank's share, response id) of each response token whose hidden state the rank holds."""
    if cp_size == 1:
        return microbatch.response_rows, microbatch.response_ids
    held = context_parallel_positions(microbatch.cu_seqlens, cp_size, cp_rank)
    place = torch.full((len(microbatch.tokens),), -1, dtype=torch.int64)
    place[held] = torch.arange(len(held))
    rows = place[microbatch.response_rows]
    return rows[rows >= 0], microbatch.response_ids[rows >= 0]
