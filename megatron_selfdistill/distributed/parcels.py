# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Objects that travel from rank to rank, without messages to ranks that need none.

A *parcel* is the object that one rank sends to another: its pickle is one message of bytes, after one message of its
size.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.distributed.collectives import raise_on_all_ranks

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


def exchange_parcels(outgoing: Mapping[int, Any], sources: Collection[int], device: torch.device) -> dict[int, Any]:
    """Send ``outgoing[r]`` to each global rank r among its keys; return what this rank gets, by global rank.

    ``sources``: the ranks whose ``outgoing`` names this rank, which may be this rank itself; no rank else sends to this
    rank.  ``device``: the device from which the world's process group takes tensors (`RankGrid.device`).

    All ranks of the world call this function, also those without ``outgoing`` and ``sources``.
    Collectives: those of `raise_on_all_ranks`, then two point-to-point messages for each pair of ranks, the size and
    the bytes.
    """
    rank = dist.get_rank()
    with raise_on_all_ranks():
        packed = {to: _pack(parcel) for to, parcel in outgoing.items()}
    received = {rank: packed.pop(rank)} if rank in packed else {}
    others = [source for source in sources if source != rank]
    sizes = torch.tensor([parcel.numel() for parcel in packed.values()], dtype=torch.int64, device=device)
    incoming_sizes = torch.empty(len(others), dtype=torch.int64, device=device)
    _swap(
        {to: sizes[i : i + 1] for i, to in enumerate(packed)},
        {source: incoming_sizes[i : i + 1] for i, source in enumerate(others)},
    )
    for source, size in zip(others, incoming_sizes.tolist(), strict=True):
        received[source] = torch.empty(size, dtype=torch.uint8, device=device)
    _swap({to: parcel.to(device) for to, parcel in packed.items()}, {source: received[source] for source in others})
    return {source: _unpack(received[source]) for source in sources}


def broadcast_in_replica(parcel: Any, grid: RankGrid) -> Any:
    """Return the ``parcel`` of the first rank of this data-parallel replica, on each of its TP x CP x PP ranks.

    The ``parcel`` of another rank is ignored.

    All ranks of the world call this function.
    Collectives: those of `raise_on_all_ranks`; a broadcast of the size and one of the bytes over the pipeline-parallel
    group of the first rank, then over the context-parallel groups of the ranks that were reached, then over all
    tensor-parallel groups, so that every rank receives the parcel once.
    """
    with raise_on_all_ranks():
        packed = _pack(parcel if grid.is_first_of_replica else None).to(grid.device)
    size = torch.tensor([packed.numel()], dtype=torch.int64, device=grid.device)
    _broadcast(size, grid)
    if not grid.is_first_of_replica:
        packed = torch.empty(int(size.item()), dtype=torch.uint8, device=grid.device)
    _broadcast(packed, grid)
    return _unpack(packed)


def _broadcast(tensor: Tensor, grid: RankGrid) -> None:
    """Broadcast ``tensor`` from the first rank of each replica to the others; stages are the farthest apart."""
    for group, takes_part in (
        (grid.pp_group, grid.cp_rank == 0 and grid.tp_rank == 0),
        (grid.cp_group, grid.tp_rank == 0),
        (grid.tp_group, True),
    ):
        if takes_part and group.size() > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)


def _swap(outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
    """Send a tensor to each rank of ``outgoing`` and receive one from each rank of ``incoming``, all at once.

    On NCCL a batch uses the communicator of the world, which connects only ranks that have sent to each other.  Some
    ranks of the world may be absent, since an earlier collective has made the communicator (`raise_on_all_ranks`).
    """
    batch = [dist.P2POp(dist.isend, tensor, to) for to, tensor in outgoing.items()]
    batch += [dist.P2POp(dist.irecv, tensor, source) for source, tensor in incoming.items()]
    for work in dist.batch_isend_irecv(batch) if batch else ():
        work.wait()


def _pack(parcel: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    return pickle.loads(packed.cpu().numpy().tobytes())
