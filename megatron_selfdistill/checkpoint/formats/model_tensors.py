# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tensors of a checkpoint that belong to the model: their names on disk, and the checks that they fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_selfdistill.errors import CheckpointError, first_few

PASSTHROUGH = "hf_passthrough."
"""The prefix of the keys of tensors that Megatron neither builds nor trains.

A checkpoint keeps such tensors for the conversion to Hugging Face.
"""

NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "teacher.")
"""The prefixes of keys in a checkpoint that do not belong to the model."""

NOT_BUILT = ("mtp.", PASSTHROUGH)
"""The prefixes of multi-token-prediction layers, which some checkpoints have and no model of this program has."""

Place = tuple[str, tuple[int, ...]]
"""A key, and the leading indices (layer, expert) of a tensor that is stored under the key."""

# Transformer Engine fuses a norm into the linear layer after it, the local spec does not.
_SAME_TENSOR = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
_LAYERS = "decoder.layers."
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def names(key: str) -> Iterator[str]:
    """Yield ``key``, then the keys of the same tensor in other layer specs."""
    yield key
    for pair in _SAME_TENSOR:
        for ours, theirs in (pair, pair[::-1]):
            if f".{ours}" in key:
                yield key.replace(f".{ours}", f".{theirs}", 1)


def places(key: str, index: tuple[int, ...]) -> Iterator[Place]:
    """Yield the possible places of a tensor: each of its `names`, with the layer number in the index or in the name."""
    for name in names(key):
        yield name, index
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            yield f"{_LAYERS}{match[2]}", (int(match[1]), *index)
        elif name.startswith(_LAYERS) and index:
            yield f"{_LAYERS}{index[0]}.{name.removeprefix(_LAYERS)}", index[1:]


def shown(key: str, index: tuple[int, ...]) -> str:
    """Return the name of a tensor for a message: ``decoder.layers.mlp.linear_fc2.weight[3]``."""
    return key + (str(list(index)) if index else "")


def has_numbered_layers(keys: Iterator[str] | set[str] | dict[str, object]) -> bool:
    """Return whether each layer of a torch_dist checkpoint has its own keys, instead of one key for all layers."""
    return any(_NUMBERED.fullmatch(key) for key in keys)


def weight_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return those of the ``shapes`` of a torch_dist checkpoint, by key, that belong to the model."""
    return {key: shape for key, shape in shapes.items() if not key.startswith(NOT_WEIGHTS)}


def raise_misfit(path: Path, faults: Sequence[str]) -> None:
    """Raise CheckpointError with the first of ``faults``, the differences to the model, if there are any."""
    if faults:
        raise CheckpointError(f"{path} does not fit this model: {first_few(faults)}")


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; wait for the device once.

    The function makes one pass without a temporary tensor: NaN propagates through the minimum and the maximum, and an
    infinity is the minimum or the maximum.
    """
    named = [(name, tensor) for name, tensor in named if tensor.numel() and tensor.is_floating_point()]
    if not named:
        return []
    bounds = torch.stack([torch.stack(torch.aminmax(tensor.detach())).double() for _, tensor in named])
    return [name for (name, _), finite in zip(named, bounds.isfinite().all(1).tolist(), strict=True) if not finite]
