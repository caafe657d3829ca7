# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stream the weights of a live model in any layout to a sampler, as buckets of (Hugging Face name, full tensor).

    exporter = Exporter(chunks, grid, family.rules(model), bucket_bytes=2**30)      # once
    for tensors in exporter.stream():                                              # after each step, on every rank
        sampler.load_weights(tensors)

A bucket takes two transfers.  First each rank of the pipeline stage that holds the bucket broadcasts its shards to the
ranks with the same coordinates in the other stages.  Then the ranks that share the tensors (TP, or expert TP x EP)
gather the shards.  So each byte crosses between two stages once, for any size of TP.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill.checkpoint.formats.model_tensors import shown
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.errors import ConfigError, first_few
from megatron_selfdistill.interop.hf.rules import MegatronSlice, Rule
from megatron_selfdistill.loss.sharded.group_collectives import all_gather
from megatron_selfdistill.model.forward import unwrapped

_ALIGNMENT = 16  # bytes: a suitable start for a tensor of any dtype
_MOST_PADDING = 1.25  # an all-gather of unequal shares may move up to this factor of their bytes


class Exporter:
    """An export of a model: it finds the holders of each part of each tensor once, and streams the present weights.

    ``chunks``: the chunks of this rank, as built or as wrapped for training.  ``rules``: the rules of the whole model;
    the exporter skips passthrough tensors, which no live model has.  ``on_ranks``: the global ranks that need the
    tensors, equal on all ranks; None means every rank.  A replica without such ranks takes no part in the transfers of
    its dense tensors.  ``part``: whether the tensor with a key of a checkpoint is in the part of the model that the
    rules describe, such as `hf.adapter_rules.is_adapter_key`; None means the whole model.

    Memory of a rank: ``bucket_bytes`` of full tensors; during the assembly of a bucket also its shards (as much again,
    and at most a quarter of padding) and one more tensor.  A tensor larger than ``bucket_bytes`` is its own bucket.
    Collectives: three gathers of descriptions, over TP, expert TP x EP and PP.

    Raises: `ConfigError` on all ranks with the first tensors that the rules or the model lack, or whose shapes differ.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        grid: RankGrid,
        rules: Sequence[Rule],
        *,
        bucket_bytes: int = 2**30,
        on_ranks: Collection[int] | None = None,
        part: Callable[[str], bool] | None = None,
    ) -> None:
        self._chunks, self._grid = list(chunks), grid
        on_ranks = None if on_ranks is None else frozenset(on_ranks)
        self._wanted_here = on_ranks is None or grid.rank in on_ranks
        # Experts are cut over their own group, expert TP x EP, which may reach beyond a replica.
        self._groups = {False: grid.tp_group, True: unwrapped(chunks[0]).pg_collection.tp_ep}
        self._depths = {rule.megatron.key: len(rule.megatron.index) for rule in rules}
        stages = self._describe_stages(part or (lambda key: True))
        self._gathers = stages[grid.pp_rank].wanting(on_ranks)
        self._relays = {expert: any(stage.wanting(on_ranks)[expert] for stage in stages) for expert in self._groups}
        group_sizes = {expert: group.size() for expert, group in self._groups.items()}
        self._buckets = [_packed(run, group_sizes) for run in _runs(_locate(rules, stages), bucket_bytes)]

    def stream(self, first: int = 0) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield every tensor of the rules once, full, in its live dtype, as lists of (Hugging Face name, tensor).

        A list is a bucket.  ``first``: the number of the bucket to begin with, equal on all ranks; 0 is the first one.

        Every rank of ``on_ranks`` receives the same lists; other ranks receive empty lists.  The stream empties a list
        when the caller asks for the next one, so that a loop never holds two buckets: keep the tensors, not the list.
        The tensors are on this rank's device, and some share storage.  A tensor that this rank holds completely is a
        view of the live weights where possible: read or copy it before training continues.  On a GPU all copies and
        transfers are queued; the stream does not wait for them.
        Buckets follow the order of pipeline stages, with dense tensors before experts, else the order of the rules.

        Collectives: every rank of the world iterates as far as the others.  First the data-parallel ranks gather the
        parameters that ``overlap_param_gather`` has not gathered yet.  Each bucket takes one broadcast over PP, and one
        all-gather over TP or expert TP x EP (or one broadcast per sender, if few ranks have something to send).
        """
        for chunk in self._chunks:
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
        # In each stream again: training wraps, offloads and casts parameters, which changes their storage.
        shards = {place: data for place, data, _ in _shards(self._chunks, self._depths)}
        for bucket in self._buckets[first:]:
            tensors = self._full_tensors(bucket, shards)
            beat()
            yield tensors
            tensors.clear()

    @torch.no_grad()
    def _full_tensors(self, bucket: _Bucket, shards: dict[Place, Tensor]) -> list[tuple[str, Tensor]]:
        if not self._relays[bucket.expert]:
            return []
        if self._grid.pp_size == 1 and self._groups[bucket.expert].size() == 1:
            return [named for tensor in bucket.tensors for named in tensor.held(shards)] if self._wanted_here else []
        packed = self._packed_shards(bucket, shards)
        if not self._gathers[bucket.expert]:
            return []
        buffers = _gathered(packed, bucket.num_bytes, self._groups[bucket.expert])
        del packed
        if not self._wanted_here:
            return []
        return [named for tensor in bucket.tensors for named in tensor.assemble(buffers, self._grid.device)]

    def _packed_shards(self, bucket: _Bucket, shards: dict[Place, Tensor]) -> Tensor:
        """Return the bytes that this rank, or its counterpart in the bucket's stage, sends, with padding."""
        me = self._groups[bucket.expert].rank()
        packed = torch.empty(max(bucket.num_bytes), dtype=torch.uint8, device=self._grid.device)
        if bucket.stage == self._grid.pp_rank:
            for tensor in bucket.tensors:
                for part in tensor.parts:
                    if part.member == me:
                        held = shards[tensor.rule.megatron, part.start]
                        part.within(packed, tensor.dtype).copy_(held[tuple(slice(n) for n in part.size)])
        if self._grid.pp_size > 1 and bucket.num_bytes[me]:
            source = dist.get_global_rank(self._grid.pp_group, bucket.stage)
            dist.broadcast(packed[: bucket.num_bytes[me]], src=source, group=self._grid.pp_group)
        return packed

    def _describe_stages(self, part: Callable[[str], bool]) -> list[_Stage]:
        """Return the description of each pipeline stage at this rank's place within the stage."""
        entries: dict[bool, list[_Entry]] = {False: [], True: []}
        for (where, start), data, shape in _shards(self._chunks, self._depths):
            if part(where.key):
                entries[_is_expert(where)].append(_Entry(where, start, tuple(data.shape), shape, data.dtype))
        members = {expert: gather_objects(entries[expert], group) for expert, group in self._groups.items()}
        ranks = {expert: dist.get_process_group_ranks(group) for expert, group in self._groups.items()}
        return gather_objects(_Stage(members, ranks), self._grid.pp_group)


@dataclass(frozen=True)
class _Entry:
    """A shard that a rank holds."""

    where: MegatronSlice
    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    """The shape of the whole slice, including padding."""
    dtype: torch.dtype


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage: for dense tensors (False) and experts (True), its shards and ranks."""

    members: dict[bool, list[list[_Entry]]]
    """The shards of each member of the group that shares the tensors."""
    ranks: dict[bool, list[int]]
    """The global ranks of that group."""

    def wanting(self, on_ranks: Collection[int] | None) -> dict[bool, bool]:
        """Return whether a rank that shares the tensors is in ``on_ranks``, for dense tensors and for experts."""
        return {
            expert: on_ranks is None or any(rank in on_ranks for rank in ranks) for expert, ranks in self.ranks.items()
        }


@dataclass(frozen=True)
class _Part:
    """A block of a tensor, and its place among the bytes that its sender sends."""

    member: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int = 0
    """The offset in the packed bytes of the sender."""

    def within(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the block as a view of the packed bytes of its sender."""
        num_bytes = math.prod(self.size) * dtype.itemsize
        return packed[self.offset : self.offset + num_bytes].view(dtype).view(self.size)

    def of_full(self, full: Tensor) -> Tensor:
        """Return the block as a view of the full tensor."""
        return full[tuple(slice(start, start + n) for start, n in zip(self.start, self.size, strict=True))]


@dataclass(frozen=True)
class _Tensor:
    """A full tensor of the export, and the parts of which it is assembled."""

    rule: Rule
    stage: int
    expert: bool
    dtype: torch.dtype
    parts: tuple[_Part, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the full tensor in bytes."""
        return math.prod(self.rule.shape) * self.dtype.itemsize

    def assemble(self, buffers: Sequence[Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Return the named Hugging Face tensors, from the packed bytes of all senders."""
        full = torch.empty(self.rule.shape, dtype=self.dtype, device=device)
        for part in self.parts:
            part.of_full(full).copy_(part.within(buffers[part.member], self.dtype))
        return zip(self.rule.hf_names, self.rule.to_hf(full), strict=True)

    def held(self, shards: Mapping[Place, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Return the named Hugging Face tensors on a rank that holds all parts, as views where possible."""
        parts = sorted(self.parts, key=lambda part: part.start)
        blocks = [shards[self.rule.megatron, part.start][tuple(slice(n) for n in part.size)] for part in parts]
        full = _as_one(blocks, self.rule.shape)
        if full is None:
            full = torch.empty(self.rule.shape, dtype=self.dtype, device=blocks[0].device)
            for part, block in zip(parts, blocks, strict=True):
                part.of_full(full).copy_(block)
        return zip(self.rule.hf_names, self.rule.to_hf(full), strict=True)


def _as_one(blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
    """Return ``blocks`` as one view of ``shape`` if they are consecutive rows in memory; else None.

    The gate and up projections of one layer are consecutive.
    """
    end = blocks[0].data_ptr()
    for block in blocks:
        if not block.is_contiguous() or block.data_ptr() != end or block.shape[1:] != torch.Size(shape[1:]):
            return None
        if block.untyped_storage().data_ptr() != blocks[0].untyped_storage().data_ptr():
            return None
        end += block.nbytes
    return blocks[0].as_strided(tuple(shape), torch.empty(tuple(shape), device="meta").stride())


@dataclass(frozen=True)
class _Bucket:
    """Consecutive tensors of one stage and kind, which are transferred together."""

    stage: int
    expert: bool
    tensors: tuple[_Tensor, ...]
    num_bytes: tuple[int, ...]
    """The number of bytes that each member of the group sends."""


def _locate(rules: Sequence[Rule], stages: Sequence[_Stage]) -> list[_Tensor]:
    """Return the tensor of each rule with its stage and one sender for each of its parts, in the order of sending."""
    held: dict[MegatronSlice, dict[int, list[tuple[int, _Entry]]]] = {}
    for number, stage in enumerate(stages):
        for members in stage.members.values():
            for member, entries in enumerate(members):
                for entry in entries:
                    held.setdefault(entry.where, {}).setdefault(number, []).append((member, entry))
    rules = [rule for rule in rules if not rule.is_passthrough]
    loads: defaultdict[tuple[int, bool], Counter[int]] = defaultdict(Counter)
    mapped = Counter(rule.megatron for rule in rules)
    faults = [f"{shown(where.key, where.index)} has no rule" for where in held if where not in mapped]
    faults += [f"{shown(where.key, where.index)} has {count} rules" for where, count in mapped.items() if count > 1]
    tensors = []
    for rule in rules:
        name = shown(rule.megatron.key, rule.megatron.index)
        if rule.megatron not in held:
            faults.append(f"{name} is not in the model")
            continue
        # Tied embeddings are in the first and in the last stage.
        number, found = min(held[rule.megatron].items())
        shape, dtype, expert = found[0][1].shape, found[0][1].dtype, _is_expert(rule.megatron)
        padded = rule.vocabulary and shape[0] >= rule.shape[0] and shape[1:] == rule.shape[1:]
        parts = _senders(found, rule.shape, loads[number, expert])
        if shape != rule.shape and not padded:
            faults.append(f"{name} has shape {list(shape)}, expected {list(rule.shape)}")
        elif sum(math.prod(part.size) for part in parts) != math.prod(rule.shape):
            faults.append(f"{name} is incomplete: the ranks of its stage do not hold all of it")
        else:
            tensors.append(_Tensor(rule, number, expert, dtype, parts))
    if faults:
        raise ConfigError(f"the rules do not fit the live model: {first_few(faults)}")
    return _taking_turns(tensors)


def _senders(found: Sequence[tuple[int, _Entry]], shape: Sequence[int], load: Counter[int]) -> tuple[_Part, ...]:
    """Return one part for each place, from the holder with the least to send; add the parts to ``load``.

    The parts exclude padding, which lies outside of ``shape``.
    """
    parts: dict[tuple[int, ...], _Part] = {}
    for member, entry in found:
        size = tuple(min(n, end - start) for n, end, start in zip(entry.size, shape, entry.start, strict=True))
        if min(size) > 0 and (entry.start not in parts or load[member] < load[parts[entry.start].member]):
            parts[entry.start] = _Part(member, entry.start, size)
    for part in parts.values():
        load[part.member] += math.prod(part.size)
    return tuple(parts.values())


def _taking_turns(tensors: Sequence[_Tensor]) -> list[_Tensor]:
    """Return ``tensors`` by stage, with dense tensors before experts, and with experts of all ranks in turn.

    So each rank sends about the same share of a bucket, and the gather needs no padding.
    """
    turns: Counter[tuple[int, int]] = Counter()
    keys = []
    for tensor in tensors:
        sender = (tensor.stage, tensor.parts[0].member)
        keys.append((tensor.stage, tensor.expert, turns[sender] if tensor.expert else 0))
        turns[sender] += tensor.expert
    return [tensors[i] for i in sorted(range(len(tensors)), key=keys.__getitem__)]


def _runs(tensors: Sequence[_Tensor], bucket_bytes: int) -> list[list[_Tensor]]:
    """Return runs of consecutive tensors of one stage and kind, of at most ``bucket_bytes`` or of one tensor."""
    runs: list[list[_Tensor]] = []
    room = 0
    for tensor in tensors:
        room -= tensor.num_bytes
        if not runs or room < 0 or (runs[-1][0].stage, runs[-1][0].expert) != (tensor.stage, tensor.expert):
            runs.append([])
            room = bucket_bytes - tensor.num_bytes
        runs[-1].append(tensor)
    return runs


def _packed(tensors: Sequence[_Tensor], group_sizes: dict[bool, int]) -> _Bucket:
    """Return the bucket of ``tensors``, with the place of each part among the bytes of its sender."""
    first = tensors[0]
    sent = [0] * group_sizes[first.expert]
    placed = []
    for tensor in tensors:
        parts = []
        for part in tensor.parts:
            parts.append(replace(part, offset=sent[part.member]))
            num_bytes = math.prod(part.size) * tensor.dtype.itemsize
            sent[part.member] += math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT
        placed.append(replace(tensor, parts=tuple(parts)))
    return _Bucket(first.stage, first.expert, tuple(placed), tuple(sent))


def _gathered(packed: Tensor, num_bytes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Return the bytes of every member.

    ``packed`` begins with the bytes of this member, and is as long as the longest share.
    """
    if group.size() == 1:
        return [packed]
    if len(num_bytes) * max(num_bytes) <= _MOST_PADDING * sum(num_bytes):
        everything = packed.new_empty(len(num_bytes) * packed.numel())
        all_gather(everything, packed, group)
        return list(everything.view(len(num_bytes), -1))
    buffers = []
    for member, length in enumerate(num_bytes):
        buffers.append(packed[:length] if member == group.rank() else packed.new_empty(length))
        if length:
            dist.broadcast(buffers[-1], src=dist.get_global_rank(group, member), group=group)
    return buffers


def _is_expert(where: MegatronSlice) -> bool:
    return ".experts." in where.key  # shared experts are dense, since every token uses them


Place = tuple[MegatronSlice, tuple[int, ...]]
"""A slice of a checkpoint, and the index at which a shard of it begins."""


def _shards(
    chunks: Sequence[torch.nn.Module], depths: Mapping[str, int]
) -> Iterator[tuple[Place, Tensor, tuple[int, ...]]]:
    """Yield the place and the weights of each shard of the model, by the names of a checkpoint, and the slice's shape.

    ``depths``: how many leading indices the rule of a key has; the other leading indices of the shard, such as the
    expert of a rule for all experts, are part of the index at which the shard begins, and axes of length 1 of the
    weights.
    """
    for chunk in chunks:
        state_dict = unwrapped(chunk).sharded_state_dict()
        apply_factories(state_dict)
        for shard in nested_values(state_dict):
            if isinstance(shard, ShardedTensor):
                stacked, offsets = int(shard.prepend_axis_num), tuple(shard.global_offset)
                depth = min(depths.get(shard.key, stacked), stacked)
                place = MegatronSlice(shard.key, offsets[:depth]), offsets[depth:]
                yield place, shard.data[(None,) * (stacked - depth)], tuple(shard.global_shape[depth:])
