# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names that different layer specs and versions of Megatron give to the same weight on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
