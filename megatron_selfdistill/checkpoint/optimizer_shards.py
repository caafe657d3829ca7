# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Save and load the state of Megatron's distributed optimizer with each parameter on one data-parallel rank only.

The files have Megatron's ``fully_reshardable`` format: float32 parameters and both moments of Adam, in the shape of the
parameter and under its name.  Megatron gathers the state on every data-parallel rank (12 bytes of host memory per
parameter of the model shard on each rank), or through gloo on the first rank, which then writes alone.  With this
module every rank receives its share of whole parameters, about ``1 / DP`` of the shard, and at a load it reads the rows
that it keeps.

Megatron's own functions also misplace parameters where the end of a bucket is padded: they confuse positions in the
padded buffer with positions in the gathered buffer.  The functions of this module use positions in the padded buffer.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KEYS = ("param", "exp_avg", "exp_avg_sq")
"""Megatron's names of the float32 parameter and of Adam's two moments."""
EXCHANGED_ELEMENTS = 2**26
"""The number of float32 elements that the ranks of a group exchange at a time: 256 MiB to send, 256 MiB to receive."""


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the distributed optimizer and the ranks that hold its state."""

    index: int
    """The number of the parameter in Megatron's order."""
    param: torch.nn.Parameter
    parts: dict[int, range]
    """The elements of the flattened parameter whose state each rank of the data-parallel group holds, by rank."""


@dataclass(frozen=True)
class _Segment:
    """Elements of one parameter that travel from the rank ``source`` to the rank ``owner`` of the group."""

    parameter: _Parameter
    source: int
    owner: int
    elements: range


@contextlib.contextmanager
def one_owner_per_parameter(optimizers: Sequence[Any]) -> Iterator[None]:
    """Make distributed optimizers use this module for ``fully_reshardable`` state while the context is open."""
    distributed = [single for single in optimizers if isinstance(single, DistributedOptimizer)]
    for single in distributed:
        single.sharded_param_state_fully_reshardable = functools.partial(parameter_state, single)
        single.load_parameter_state_from_fully_reshardable = functools.partial(load_parameter_state, single)
    try:
        yield
    finally:
        for single in distributed:
            del single.sharded_param_state_fully_reshardable
            del single.load_parameter_state_from_fully_reshardable


def parameter_state(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """Return ``{number of the parameter: {"param" | "exp_avg" | "exp_avg_sq": sharded tensors}}`` of this rank.

    ``model``: the sharded state dict of the model, which gives the names, shapes and offsets of the state.  For a save
    the result holds the parameters that this rank writes, as float32 tensors in host memory, without the parameters
    whose model shard another tensor-parallel rank writes.  With ``is_loading`` the result holds the rows that this rank
    keeps, as empty tensors in host memory.  Megatron passes ``metadata``, which is not used.

    Collectives: for a save, ``all_to_all_single`` of float32 in the data-parallel group, in rounds of at most
    `EXCHANGED_ELEMENTS`.
    """
    described = _described(model)
    parameters = _parameters(optimizer)
    if is_loading:
        rank = optimizer.data_parallel_group.rank()
        return {
            one.index: {key: _rows(described[one.param], key, one.parts[rank]) for key in KEYS}
            for one in parameters
            if rank in one.parts
        }
    # Other tensor-parallel ranks and stages write no copies; replica ids end with the data-parallel rank.
    saved = [one for one in parameters if not any(described[one.param].replica_id[:-1])]
    owned = _collect(optimizer, saved)
    return {
        one.index: {key: _sharded(described[one.param], key, owned[one.index][key]) for key in KEYS}
        for one in saved
        if one.index in owned
    }


@torch.no_grad()
def load_parameter_state(optimizer: DistributedOptimizer, loaded: dict[int, dict[str, Any]]) -> None:
    """Copy ``loaded``, the tensors of `parameter_state` with ``is_loading``, into the optimizer's own state."""
    rank = optimizer.data_parallel_group.rank()
    for one in _parameters(optimizer):
        if rank not in one.parts:
            continue
        part, width = one.parts[rank], _row_size(one.param)
        first = part.start // width * width  # the first element of the rows
        group, place = optimizer.model_param_group_index_map[one.param]
        own = optimizer.optimizer.param_groups[group]["params"][place]
        state = {"param": own, **optimizer.optimizer.state[own]}
        for key in KEYS:  # the state of torch's Adam also has a step, which Megatron would look up in a checkpoint
            rows = torch.cat([piece.flatten() for _, piece in sorted(loaded[one.index][key].items())])
            state[key].copy_(rows[part.start - first : part.stop - first])


def _parameters(optimizer: DistributedOptimizer) -> list[_Parameter]:
    """Return all parameters in Megatron's order, equal on all ranks of the data-parallel group."""
    found: list[_Parameter] = []
    for buffer in optimizer.buffers:
        for param, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // optimizer.data_parallel_group.size()
            first, last = (start - bucket.offset) // share, (end - 1 - bucket.offset) // share
            parts = {}
            for rank in range(first, last + 1):
                low = bucket.offset + rank * share
                parts[rank] = range(max(start, low) - start, min(end, low + share) - start)
            found.append(_Parameter(len(found), param, parts))
    return found


def _owners(parameters: Sequence[_Parameter]) -> dict[int, int]:
    """Return the rank of the group that writes each parameter, by the number of the parameter.

    The owner holds a part of the parameter, and the ranks write about the same number of elements.
    """
    load: dict[int, int] = {}
    owners: dict[int, int] = {}
    for one in sorted(parameters, key=lambda one: (len(one.parts) > 1, -one.param.numel(), one.index)):
        owner = min(one.parts, key=lambda rank: (load.get(rank, 0), -len(one.parts[rank]), rank))
        owners[one.index] = owner
        load[owner] = load.get(owner, 0) + one.param.numel()
    return owners


def _collect(optimizer: DistributedOptimizer, parameters: Sequence[_Parameter]) -> dict[int, dict[str, Tensor]]:
    """Return the flattened float32 state of the parameters that this rank owns, in host memory."""
    group = optimizer.data_parallel_group
    rank, owners = group.rank(), _owners(parameters)
    mine = {
        one.index: optimizer._get_main_param_and_optimizer_states(one.param) for one in parameters if rank in one.parts
    }
    owned = {
        one.index: {key: torch.empty(one.param.numel(), dtype=torch.float32) for key in KEYS}
        for one in parameters
        if owners[one.index] == rank
    }
    travelling: list[_Segment] = []
    for one in parameters:
        owner = owners[one.index]
        for source, part in one.parts.items():
            if source != owner:
                for low in range(part.start, part.stop, EXCHANGED_ELEMENTS):
                    elements = range(low, min(low + EXCHANGED_ELEMENTS, part.stop))
                    travelling.append(_Segment(one, source, owner, elements))
            elif owner == rank:
                for key in KEYS:
                    owned[one.index][key][part.start : part.stop].copy_(mine[one.index][key].detach())
    for key in KEYS:
        for some in _rounds(travelling):
            _exchange(some, {index: state[key] for index, state in mine.items()}, owned, key, group)
    return owned


def _rounds(segments: Sequence[_Segment]) -> Iterator[list[_Segment]]:
    some: list[_Segment] = []
    filled = 0
    for segment in segments:
        if some and filled + len(segment.elements) > EXCHANGED_ELEMENTS:
            yield some
            some, filled = [], 0
        some.append(segment)
        filled += len(segment.elements)
    if some:
        yield some


def _exchange(
    segments: Sequence[_Segment],
    mine: dict[int, Tensor],
    owned: dict[int, dict[str, Tensor]],
    key: str,
    group: dist.ProcessGroup,
) -> None:
    """Send the elements of ``segments`` to their owners; collective in ``group``."""
    rank, size = group.rank(), group.size()
    device = torch.device("cpu") if cpu.ON_CPU else torch.device("cuda", torch.cuda.current_device())
    sent = sorted((s for s in segments if s.source == rank), key=lambda s: s.owner)
    received = sorted((s for s in segments if s.owner == rank), key=lambda s: s.source)
    outgoing, incoming = [0] * size, [0] * size
    parts = []
    for segment in sent:
        outgoing[segment.owner] += len(segment.elements)
        start = segment.parameter.parts[rank].start  # the first element that this rank holds
        parts.append(mine[segment.parameter.index][segment.elements.start - start : segment.elements.stop - start])
    for segment in received:
        incoming[segment.source] += len(segment.elements)
    source = torch.cat([part.detach().float() for part in parts]) if parts else torch.empty(0, device=device)
    target = torch.empty(sum(incoming), device=device)
    dist.all_to_all_single(target, source, incoming, outgoing, group=group)
    arrived = torch.split(target, [len(segment.elements) for segment in received]) if received else ()
    for segment, values in zip(received, arrived, strict=True):
        owned[segment.parameter.index][key][segment.elements.start : segment.elements.stop].copy_(values)


def _described(model: dict[str, Any]) -> dict[Any, ShardedTensor | ShardedTensorFactory]:
    sharded, _ = extract_sharded_tensors_and_factories(model)
    return {one.data: one for one in nested_values(sharded)}


def _sharded(described: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor) -> Any:
    """Return the state ``flat`` of a whole parameter as a sharded tensor with one replica, under its checkpoint key."""
    data = flat.view(described.data.shape)
    main = (*described.replica_id[:-1], 0)
    changes: dict[str, Any] = {"key": f"optimizer.state.{key}.{described.key}", "data": data, "replica_id": main}
    if isinstance(described, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(described, **changes)


def _rows(described: ShardedTensor | ShardedTensorFactory, key: str, part: range) -> dict[int, ShardedTensor]:
    """Return empty float32 tensors for the rows of a parameter in which the elements ``part`` of it lie, in order."""
    shape = described.data.shape
    width = _row_size(described.data)
    first, last = part.start // width, -(-part.stop // width)
    full = _sharded(described, key, torch.empty(math.prod(shape), dtype=torch.float32, device="meta"))
    pieces = [full] if isinstance(full, ShardedTensor) else full.build()
    found: dict[int, ShardedTensor] = {}
    start = 0  # the row of the parameter at which the piece begins
    for piece in pieces:  # in the order of rows: a gated MLP stores its two halves apart
        low, high = max(first - start, 0), min(last - start, piece.local_shape[0])
        if low < high:
            found[len(found)] = _cut(piece, low, high)
        start += piece.local_shape[0]
    if start != (shape[0] if len(shape) else 1):
        raise RuntimeError(f"{described.key} is stored in pieces that do not lie one below the other")
    return found


def _cut(piece: ShardedTensor, low: int, high: int) -> ShardedTensor:
    """Return the rows ``low`` to ``high`` of ``piece``, empty and in host memory."""
    leading = piece.prepend_axis_num
    sizes = (*(1 for _ in range(leading)), high - low, *piece.local_shape[1:])
    offset = list(piece.global_offset)
    offset[leading] += low
    return replace(
        piece,
        data=torch.zeros(sizes, dtype=torch.float32),  # zero, because padding rows of the vocabulary may not be stored
        local_shape=sizes,
        global_offset=tuple(offset),
        axis_fragmentations=None,  # ranks may have different numbers of rows
        prepend_axis_num=0,
    )


def _row_size(param: Tensor) -> int:
    return math.prod(param.shape[1:])
