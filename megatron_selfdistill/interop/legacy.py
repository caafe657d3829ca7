# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read Megatron-LM's ``torch`` format, one pickle per model-parallel rank, as full tensors under torch_dist's names.

    iter_0000100/mp_rank_00_001[_003]/model_optim_rng.pt        tensor, pipeline [and expert] rank

Tensors stay on disk until the caller reads them.  The format numbers layers per stage and chunk.  A norm of Transformer
Engine has the name of the linear layer after it, a norm of the local spec has its own name.  A shard of a gated
``linear_fc1`` holds a part of the gate projection above a part of the up projection.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.directory import LEGACY_FILE
from megatron_selfdistill.checkpoint.formats.model_tensors import Place, places, shown
from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled
from megatron_selfdistill.errors import CheckpointError


@dataclass(frozen=True)
class _Rank:
    """The coordinates of a model-parallel rank."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class _Shard:
    """A tensor in the file of one rank."""

    rank: _Rank
    chunk: str
    name: str


class LegacyReader:
    """The weights of a legacy checkpoint, under the keys and stacked indices of torch_dist.

    Raises: CheckpointError for a file that is missing or corrupt, or that asks for a refused global.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        files = {file.parent.name: file for file in sorted(self.directory.glob(f"mp_rank_*/{LEGACY_FILE}"))}
        if not files:
            raise CheckpointError(f"{directory} has no mp_rank_*/{LEGACY_FILE}")
        first = load_pickled(next(iter(files.values())), mmap=True)
        self.args = _arguments(first, self.directory)
        self.iteration = int(first.get("iteration") or 0)
        sizes = {axis: int(getattr(self.args, f"{axis}_model_parallel_size", None) or 1) for axis in _AXES}
        self._tp_size = sizes["tensor"]
        self._etp_size = int(getattr(self.args, "expert_tensor_parallel_size", None) or self._tp_size)
        self._ranks = {_rank_of(name, sizes): file for name, file in files.items()}
        self._states: dict[_Rank, dict[str, dict[str, Tensor]]] = {}
        self._shards = self._find_shards(sizes)
        self._gated = bool(getattr(self.args, "swiglu", False) or getattr(self.args, "gated_linear_unit", False))

    @property
    def tensors(self) -> set[Place]:
        """The key and index of every tensor of the model."""
        return set(self._shards)

    def place(self, key: str, index: tuple[int, ...]) -> Place | None:
        """Return the place of a tensor in this checkpoint, under any of its names; None if the tensor is missing."""
        return next((place for place in places(key, index) if place in self._shards), None)

    def dtype_at(self, place: Place) -> torch.dtype:
        """Return the type of the tensor at ``place``."""
        return self._load(self._shards[place][0]).dtype

    def full_shape(self, place: Place, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the full tensor; ``expected`` shows the axis along which the shards are cut."""
        shapes = [tuple(self._load(shard).shape) for shard in self._tensor_parallel(place)]
        axis = _cut_axis(place[0], shapes, expected)
        full = list(shapes[0])
        if axis is not None:
            full[axis] = sum(shape[axis] for shape in shapes)
        return tuple(full)

    def read_at(self, place: Place, expected: tuple[int, ...], num_rows: int | None = None) -> Tensor:
        """Return the full tensor, in the shape of `full_shape`, or its first ``num_rows`` rows."""
        parts = [self._load(shard) for shard in self._tensor_parallel(place)]
        axis = _cut_axis(place[0], [tuple(part.shape) for part in parts], expected)
        if axis is None:
            return parts[0][:num_rows]
        if ".linear_fc1." in place[0] and self._gated and axis == 0:
            halves = [part.chunk(2) for part in parts]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(parts, dim=axis)[:num_rows]

    def sizes(self) -> dict[torch.dtype, int]:
        """Return the number of elements of the model's tensors by type, including padding."""
        sizes: dict[torch.dtype, int] = {}
        for place in self._shards:
            parts = [self._load(shard) for shard in self._tensor_parallel(place)]
            # There is no expected shape here.  Norms, routers and the like are replicated on every rank.
            is_replicated = len(parts) == 1 or not _IS_CUT.search(place[0])
            count = parts[0].numel() if is_replicated else sum(part.numel() for part in parts)
            sizes[parts[0].dtype] = sizes.get(parts[0].dtype, 0) + count
        return sizes

    def unused(self, used: Collection[Place]) -> list[str]:
        """Return a fault for each tensor that has no place in ``used``."""
        return [f"{shown(*place)} is unexpected" for place in sorted(self.tensors - set(used))]

    def _tensor_parallel(self, place: Place) -> list[_Shard]:
        """Return one shard per tensor-parallel rank, in order, without replicas."""
        by_rank: dict[int, _Shard] = {}
        size = self._etp_size if ".experts." in place[0] else self._tp_size
        for shard in self._shards[place]:
            by_rank.setdefault(shard.rank.tensor % size, shard)
        if len(by_rank) != size:
            raise CheckpointError(f"{self.directory} has {len(by_rank)} of {size} shards of {shown(*place)}")
        return [by_rank[rank] for rank in range(size)]

    def _find_shards(self, sizes: dict[str, int]) -> dict[Place, list[_Shard]]:
        names: dict[_Rank, dict[str, list[str]]] = {}
        for rank in sorted(self._ranks, key=lambda r: (r.pipeline, r.expert, r.tensor)):
            names[rank] = {chunk: list(tensors) for chunk, tensors in self._state(rank).items()}
            self._states.pop(rank)  # keep the table of contents of one rank at a time
        offsets = _layer_offsets({rank.pipeline: by_chunk for rank, by_chunk in names.items()})
        num_experts = getattr(self.args, "num_experts", None) or getattr(self.args, "num_moe_experts", None) or 0
        found: dict[Place, list[_Shard]] = defaultdict(list)
        for rank, by_chunk in names.items():
            first_expert = rank.expert * (num_experts // sizes["expert"])
            for chunk, tensors in by_chunk.items():
                for name in tensors:
                    place = _place(name, offsets[rank.pipeline, chunk], first_expert)
                    if place is not None:
                        found[place].append(_Shard(rank, chunk, name))
        if getattr(self.args, "untie_embeddings_and_output_weights", None) is False:
            # The last stage of a pipeline holds a copy of the tied embedding.
            found.pop(("output_layer.weight", ()), None)
        return dict(found)

    def _load(self, shard: _Shard) -> Tensor:
        if len(self._states) > _OPEN_FILES:
            self._states.clear()
        return self._state(shard.rank)[shard.chunk][shard.name]

    def _state(self, rank: _Rank) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a rank by chunk and name, mapped from its file."""
        if rank not in self._states:
            loaded = load_pickled(self._ranks[rank], mmap=True)
            chunks = {key: value for key, value in loaded.items() if re.fullmatch(r"model\d*", key)}
            if not chunks:
                raise CheckpointError(f"{self._ranks[rank]} has no model in it, expected a key model or model0")
            self._states[rank] = {
                chunk: {name.removeprefix("module."): t for name, t in state.items() if torch.is_tensor(t)}
                for chunk, state in chunks.items()
            }
        return self._states[rank]


_AXES = ("tensor", "pipeline", "expert")
_OPEN_FILES = 64
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_VOCABULARY = ("embedding.word_embeddings.", "output_layer.")
_IS_CUT = re.compile(
    r"word_embeddings|output_layer|linear_(qkv|fc1|q_proj|q_up_proj|kv_up_proj|proj|fc2)\.weight|linear_(qkv|fc1)\.bias"
)
# The same expert in SequentialMLP (local), TEGroupedMLP (Transformer Engine), and their biases.
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")


def _layer_offsets(stages: dict[int, dict[str, list[str]]]) -> dict[tuple[int, str], int]:
    """Return the global number of the first layer of each (stage, chunk): chunk by chunk over all stages."""
    offsets, total = {}, 0
    for _, stage, chunk in sorted(
        (int(c.removeprefix("model") or 0), s, c) for s, chunks in stages.items() for c in chunks
    ):
        offsets[stage, chunk] = total
        total += len({match[1] for name in stages[stage][chunk] if (match := _LAYER.match(name))})
    return offsets


def _cut_axis(key: str, shapes: list[tuple[int, ...]], expected: tuple[int, ...]) -> int | None:
    """Return the axis along which shards are cut; None if each shard is the full tensor."""
    if len(shapes) == 1:
        return None
    if key.startswith(_VOCABULARY):
        return 0  # the rows, with or without padding
    differing = [axis for axis, size in enumerate(expected) if axis < len(shapes[0]) and shapes[0][axis] != size]
    return differing[0] if len(differing) == 1 and len(shapes[0]) == len(expected) else None


def _place(name: str, first_layer: int, first_expert: int) -> Place | None:
    """Return torch_dist's key and index for the tensor ``name`` of a rank; None for an entry that is not a weight."""
    if name.endswith("_extra_state") or "._extra_state" in name or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    match = _LAYER.match(name)
    if match is None:
        return name, ()
    layer, rest = first_layer + int(match[1]), match[2]
    if expert := _LOCAL_EXPERT.fullmatch(rest):
        return f"decoder.layers.mlp.experts.experts.{expert[2]}.{expert[3]}", (layer, first_expert + int(expert[1]))
    if expert := _GROUPED_EXPERT.fullmatch(rest):
        return f"decoder.layers.mlp.experts.experts.{expert[1]}.{expert[2]}", (layer, first_expert + int(expert[3]))
    return f"decoder.layers.{rest}", (layer,)


def _arguments(state: Any, directory: Path) -> argparse.Namespace:
    args: argparse.Namespace | None = state.get("args") if isinstance(state, dict) else None
    if args is None:
        raise CheckpointError(f"{directory} stores no arguments, which its layout needs: save it again")
    if float(state.get("checkpoint_version", 3.0)) < 3.0:
        raise CheckpointError(f"{directory} has checkpoint_version {state['checkpoint_version']}, expected 3.0")
    return args


def _rank_of(name: str, sizes: dict[str, int]) -> _Rank:
    """Return the rank of a directory such as ``mp_rank_00_001_003``.

    Megatron-LM writes the second and third number only for pipeline and expert sizes above 1.
    """
    numbers = [int(number) for number in name.removeprefix("mp_rank_").split("_")]
    expected = 1 + (sizes["pipeline"] > 1) + (sizes["expert"] > 1)
    if len(numbers) != expected:
        raise CheckpointError(f"{name} names {len(numbers)} ranks, but the arguments in it have the sizes {sizes}")
    later = iter(numbers[1:])
    pipeline = next(later) if sizes["pipeline"] > 1 else 0
    return _Rank(numbers[0], pipeline, next(later) if sizes["expert"] > 1 else 0)
