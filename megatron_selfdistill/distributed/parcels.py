# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Arrays of any lengths that travel from rank to rank, without pickles and without messages to ranks that need none.

A *parcel* is the list of NumPy arrays that one rank sends to another; they arrive with equal bits.  A parcel is one
message of bytes, after one message of its size.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_selfdistill.distributed.collectives import raise_on_all_ranks

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


def exchange_parcels(
    outgoing: Mapping[int, Sequence[NDArray[Any]]], sources: Collection[int], device: torch.device
) -> dict[int, list[NDArray[Any]]]:
    """Send ``outgoing[r]`` to each global rank r among its keys; return what this rank gets, by global rank.

    ``sources``: the ranks whose ``outgoing`` names this rank, which may be this rank itself; no rank else sends to this
    rank.  ``device``: the device from which the world's process group takes tensors (`RankGrid.device`).  The arrays of
    the result are in host memory; an empty list arrives as an empty list.

    All ranks of the world call this function, also those without ``outgoing`` and ``sources``.
    Collectives: those of `raise_on_all_ranks`, then two point-to-point messages for each pair of ranks, the size and
    the bytes, or only the size if the list is empty.
    Raises: ValueError on all ranks alike, before any message, for an array of Python objects.
    """
    rank = dist.get_rank()
    with raise_on_all_ranks():
        packed = {to: _pack(arrays) for to, arrays in outgoing.items()}
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
    _swap(
        {to: parcel.to(device) for to, parcel in packed.items() if parcel.numel()},
        {source: received[source] for source in others if received[source].numel()},
    )
    return {source: _unpack(received[source]) for source in sources}


def broadcast_in_replica(arrays: Sequence[NDArray[Any]], grid: RankGrid) -> list[NDArray[Any]]:
    """Return the ``arrays`` of the first rank of this data-parallel replica, on each of its TP x CP x PP ranks.

    ``arrays`` of the other ranks are ignored.

    All ranks of the world call this function.
    Collectives: those of `raise_on_all_ranks`; a broadcast of the size and one of the bytes over the pipeline-parallel
    group of the first rank, then over the context-parallel groups of the ranks that were reached, then over all
    tensor-parallel groups, so that every rank receives the arrays once.
    Raises: ValueError on all ranks alike, before any broadcast, for an array of Python objects.
    """
    with raise_on_all_ranks():
        packed = _pack(arrays if grid.is_first_of_replica else [])
    size = torch.tensor([packed.numel()], dtype=torch.int64, device=grid.device)
    _broadcast(size, grid)
    if grid.is_first_of_replica:
        parcel = packed.to(grid.device)
    else:
        parcel = torch.empty(int(size.item()), dtype=torch.uint8, device=grid.device)
    if parcel.numel():
        _broadcast(parcel, grid)
    return _unpack(parcel)


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


def _pack(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """Return ``arrays``, one after the other, as the bytes of NumPy's own format, without pickles."""
    packed = io.BytesIO()
    for array in arrays:
        np.save(packed, array, allow_pickle=False)
    return torch.tensor(np.frombuffer(packed.getvalue(), np.uint8))


def _unpack(parcel: Tensor) -> list[NDArray[Any]]:
    packed, arrays = io.BytesIO(parcel.cpu().numpy().tobytes()), list[NDArray[Any]]()
    while packed.tell() < parcel.numel():
        arrays.append(np.load(packed, allow_pickle=False))
    return arrays


def cut(values: NDArray[Any], lengths: NDArray[Any]) -> Iterator[list[Any]]:
    """Yield the numbers of ``values`` in lists of these ``lengths``, one behind the other."""
    first = 0
    for length in lengths.tolist():
        yield values[first : first + length].tolist()
        first += length
