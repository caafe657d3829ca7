# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tiny models with the same weights in every layout, for tests of sampling, schedules and checkpoints.

    chunks, grid = build(model_config("moe"), ParallelConfig(expert_model_parallel_size=2))

Each weight is a function of its global name and full shape (`full_weight`), so every rank fills its own shards and
reads no checkpoint.  The weights are large enough that greedy text does not repeat itself and logits are far from ties.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, YarnConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed.ranks import RankGrid, current_grid, initialize
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import unwrapped

if TYPE_CHECKING:
    from megatron_selfdistill.instruments.plan.stages import Stage

VOCAB_SIZE = 61  # prime: no shard is full; padded to a multiple of 8 * tp

_GQA = ModelConfig(
    **{"vocab_size": VOCAB_SIZE, "make_vocab_size_divisible_by": 8, "num_layers": 4, "hidden_size": 32},
    **{"ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "max_position_embeddings": 256},
)
_MODELS = {
    "gqa": _GQA,  # grouped queries, untied, 4 layers
    "shallow": dataclasses.replace(_GQA, num_layers=2),
    "tied": dataclasses.replace(_GQA, share_embeddings_and_output_weights=True, add_qkv_bias=True),  # 4 layers
    "moe": dataclasses.replace(_GQA, num_layers=2, num_moe_experts=4, moe_ffn_hidden_size=32, qk_layernorm=True),
    "gated_delta": dataclasses.replace(
        _GQA,
        qk_layernorm=True,
        transformer={
            **{"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6},
            **{"linear_value_head_dim": 10, "linear_conv_kernel_dim": 3, "attention_output_gate": True},
        },
    ),
}
ROTATIONS: dict[str, dict[str, Any]] = {
    "YaRN": {
        "position_embedding_type": "yarn",
        "yarn": YarnConfig(rotary_scaling_factor=4.0, original_max_position_embeddings=16, beta_fast=2.0),
    },
    "divided positions": {"seq_len_interpolation_factor": 2.0},
    "partial rotation": {"rotary_percent": 0.5},
}
"""Changes of a configuration that give its rotary positions another form."""
_MODELS |= {
    "yarn": dataclasses.replace(_MODELS["shallow"], **ROTATIONS["YaRN"]),
    "partial": dataclasses.replace(_MODELS["shallow"], **ROTATIONS["partial rotation"]),
}
KINDS = tuple(_MODELS)


def model_config(kind: str = "gqa", **changes: Any) -> ModelConfig:
    """Return a configuration of ``_MODELS``, such as ``moe`` (4 experts, 2 per token); ``changes`` replace fields."""
    return dataclasses.replace(_MODELS[kind], **changes)


def parallel(
    tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, ep: int = 1, etp: int | None = None, sp: bool = False
) -> ParallelConfig:
    return ParallelConfig(
        **{"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp},
        **{"virtual_pipeline_model_parallel_size": vpp, "expert_model_parallel_size": ep},
        **{"expert_tensor_parallel_size": etp, "sequence_parallel": sp},
    )


def build(
    model: ModelConfig, parallel: ParallelConfig, *, optimizer=None, schedule=None, seed: int | None = 0
) -> tuple[list[torch.nn.Module], RankGrid]:
    """Return this rank's chunks, filled with ``seed``, and the grid; without a seed they keep Megatron's values."""
    from megatron.core import parallel_state

    exist = parallel_state.model_parallel_is_initialized()
    grid = current_grid(parallel) if exist else initialize(parallel, seed=1234)
    optimizer = optimizer or OptimizerConfig(precision="fp32")
    config = transformer_config(model, parallel, optimizer, schedule or ScheduleConfig())
    assert model.vocab_size is not None
    chunks = build_chunks(model, config, grid, model.vocab_size)
    if seed is not None:
        fill_from_names(chunks, seed)
    return chunks, grid


def another(
    model: ModelConfig, chunks: Sequence[torch.nn.Module], grid: RankGrid, seed: int = 1
) -> list[torch.nn.Module]:
    """Return other chunks of the model and the layout of ``chunks``, filled from names."""
    made = build_chunks(model, unwrapped(chunks[0]).config, grid, VOCAB_SIZE)
    fill_from_names(made, seed)
    return made


def planned(
    model: ModelConfig, parallel: ParallelConfig, world_size: int, adapter: AdapterConfig | None = None
) -> list[Stage]:
    """Return the stages of the same model as meta tensors, in a world of any size."""
    config = transformer_config(model, parallel, OptimizerConfig(), ScheduleConfig())
    assert model.vocab_size is not None
    from megatron_selfdistill.instruments.plan.stages import stages

    return stages(model, config, parallel, model.vocab_size, world_size, adapter)


@torch.no_grad()
def fill_from_names(chunks: Sequence[torch.nn.Module], seed: int = 0) -> None:
    """Set every parameter and buffer of a checkpoint to its slice of `full_weight`; a ``seed`` makes a model."""
    filled: set[int] = set()
    for chunk in chunks:
        model = unwrapped(chunk)
        for shard in sharded_tensors(model):
            shard.data.copy_(shard_of(full_weight(shard.key, shard.global_shape, seed), shard))
            filled.add(shard.data.untyped_storage().data_ptr())
        missing = [n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() not in filled]
        assert not missing, f"no global name for {missing}"


def sharded_tensors(model: Any) -> list[ShardedTensor]:
    state_dict = model.sharded_state_dict(prefix="")
    apply_factories(state_dict)
    return [shard for shard in nested_values(state_dict) if isinstance(shard, ShardedTensor)]


def shard_of(full: Any, shard: ShardedTensor) -> Any:
    """Return the part of a full tensor, in which layers or experts are stacked, that ``shard`` describes."""
    for offset in shard.global_offset[: shard.prepend_axis_num]:
        full = full[offset]
    places = zip(shard.global_offset[shard.prepend_axis_num :], shard.local_shape, strict=True)
    for dim, (offset, length) in enumerate(places):
        full = full.narrow(dim, offset, length)
    return full


def full_weight(key: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Return the full tensor with the name ``key``.

    A tensor with more rows begins with the rows of a tensor with fewer rows, so that vocabularies with the padding of
    different TP sizes agree.
    """
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    normal = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little"))).standard_normal(tuple(shape))
    weight = torch.from_numpy(normal).float()
    if "norm" in key:
        return 1 + 0.2 * weight
    if key.endswith("expert_bias"):
        return 0.05 * weight
    if key.endswith("bias"):
        return 0.3 * weight
    if key.startswith(("embedding.", "output_layer.")):
        return 0.35 * weight
    # Attention must look at few tokens and the layers must outweigh the residual stream; otherwise the text repeats
    # one token.
    gains = {"linear_qkv": 2.0, "linear_proj": 4.0, "linear_fc2": 4.0, "router": 2.0}
    gain = next((gain for name, gain in gains.items() if name in key), 1.0)
    return gain / math.sqrt(shape[-1]) * weight
