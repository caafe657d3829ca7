# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The layers of a model that have a gated delta net in the place of attention, and their layer specs."""

from __future__ import annotations

import copy

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_selfdistill.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetLinears


def place_gated_delta_nets(
    block: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool
) -> None:
    """Put a `GatedDeltaNet` into the layers of this rank's chunk that have one, in the place of attention.

    ``block``: the layer specs of the chunk, complete but for this.  ``transformer_engine``: whether they are
    Transformer Engine's.
    """
    linear = gated_delta_layers(config)
    if not any(linear):
        return
    linears = _linears(transformer_engine)
    block.layer_specs = [
        _with_gated_delta_net(spec, linears, includes_norm=transformer_engine) if linear[number] else spec
        for number, spec in zip(_layers_of_chunk(config, vp_stage), block.layer_specs, strict=True)
    ]


def gated_delta_layers(config: TransformerConfig) -> list[bool]:
    """Return whether each layer of the model has a gated delta net in the place of attention."""
    if config.experimental_attention_variant != "gated_delta_net":
        return [False] * config.num_layers
    freq = config.linear_attention_freq
    if isinstance(freq, int):
        return [(i + 1) % freq != 0 for i in range(config.num_layers)]
    return [bool(linear) for linear in freq or []]


def _layers_of_chunk(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """Return the numbers of the layers of one model chunk of this rank, from 0."""
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout
        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage))
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def _linears(transformer_engine: bool) -> GatedDeltaNetLinears:
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        return GatedDeltaNetLinears(TELayerNormColumnParallelLinear, TERowParallelLinear)
    return GatedDeltaNetLinears(ColumnParallelLinear, RowParallelLinear)


def _with_gated_delta_net(layer: ModuleSpec, linears: GatedDeltaNetLinears, *, includes_norm: bool) -> ModuleSpec:
    """Return a copy of a layer spec with a `GatedDeltaNet`; ``includes_norm``: whether ``in_proj`` has the norm."""
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=linears)
    if includes_norm:
        layer.submodules.input_layernorm = IdentityOp
    else:
        names = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
        layer.submodules.sharded_state_dict_keys_map = layer.submodules.sharded_state_dict_keys_map | names
    return layer
