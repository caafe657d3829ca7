# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Make Megatron's ``TransformerConfig`` and layer spec from a `ModelConfig`.

The layer spec is Transformer Engine's where it can be imported, else the local spec with our RMSNorm and core
attention.  The annex ``architectures`` completes it for a model with its layers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch

from megatron_selfdistill.compat import cpu, older_megatron, repairs  # isort: skip  (before megatron.core)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.fused_kernels import Installed, fused_kernels
from megatron_selfdistill.model.known_faults import has_rare_layers, has_sinks, refuse_known_faults
from megatron_selfdistill.model.layers import RMSNorm
from megatron_selfdistill.model.local_attention import CoreAttention

# Process groups, optimizer and loss are built from these keys, which an override would contradict.
_SET_ELSEWHERE = {
    **{f.name: f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)},
    **dict.fromkeys(["bf16", "fp16", "params_dtype", "pipeline_dtype"], "optimizer.precision"),
}

_SAME_IN_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "normalization", "layernorm_epsilon", "gated_linear_unit"),
    *("add_bias_linear", "add_qkv_bias", "qk_layernorm", "init_method_std"),
)
_SAME_IN_PARALLEL = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "sequence_parallel"),
)
"""The fields of ``TransformerConfig`` that are keys with the same name and value."""


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> TransformerConfig:
    """Return Megatron's configuration of the model; ``model.transformer`` overrides all other keys.

    Raises: `ConfigError` for a field of ``model.transformer`` that belongs to another section, for fields and values
    that Megatron Core refuses, and for the faults of `refuse_known_faults`.
    """
    values = _configured_values(model, parallel, optimizer, schedule)
    installed = Installed(cuda=not cpu.ON_CPU, transformer_engine=uses_transformer_engine())
    read_by_kernels = values | model.transformer | {"position_embedding_type": model.position_embedding_type}
    values |= fused_kernels(read_by_kernels, model.activation, installed) | model.transformer
    mla = bool(values.get("multi_latent_attention"))
    cls = MLATransformerConfig if mla else TransformerConfig
    if mla:  # latent attention computes its own rotary embedding
        values = {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent} | values
    for name in model.transformer.keys() & _SET_ELSEWHERE.keys():
        raise ConfigError(f"model.transformer.{name} is not allowed: set {_SET_ELSEWHERE[name]}")
    if values.get("window_size") is not None:
        values["window_size"] = tuple(values["window_size"])  # Transformer Engine compares it with tuples
    try:
        config = cls(**values)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"Megatron Core refuses this model: {' '.join(str(error).split())}") from error
    if model.position_embedding_type == "yarn" or model.latent_layernorm_epsilon or model.qk_layernorm_all_heads:
        door("architectures").set_attributes(config, model)
    refuse_known_faults(config, transformer_engine=installed.transformer_engine)
    return config


def _configured_values(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` from the configuration, without ``model.transformer``."""
    has_experts = model.transformer.get("num_moe_experts", model.num_moe_experts) is not None
    dtype = torch.bfloat16 if optimizer.precision == "bf16" else torch.float32
    values: dict[str, Any] = {
        **{name: getattr(model, name) for name in _SAME_IN_MODEL},
        **{name: getattr(parallel, name) for name in _SAME_IN_PARALLEL},
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "hidden_dropout": 0.0,  # dropout would make the student differ from the sampler
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": optimizer.precision == "bf16",
        "use_cpu_initialization": cpu.ON_CPU,
        # Megatron Core refuses the size for a dense model, which may stand beside a mixture of experts in one run.
        "expert_model_parallel_size": parallel.expert_model_parallel_size if has_experts else 1,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        # With two stages the previous and the next stage are the same rank, and batched messages would cross.
        "batch_p2p_comm": parallel.pipeline_model_parallel_size != 2,
        "deallocate_pipeline_outputs": not cpu.ON_CPU,  # gloo may still read the buffer
        "moe_token_dispatcher_type": "alltoall",
        **{f"recompute_{name}": value for name, value in dataclasses.asdict(schedule.recompute).items()},
    }
    if schedule.recompute.granularity != "selective":
        del values["recompute_modules"]
    if model.num_moe_experts is not None:
        values |= {
            "num_moe_experts": model.num_moe_experts,
            "moe_router_topk": model.moe_router_topk,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size or values["ffn_hidden_size"],
            "moe_router_load_balancing_type": "aux_loss" if model.transformer.get("moe_aux_loss_coeff") else "none",
            "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
            "moe_router_score_function": model.moe_router_score_function,
        }
    return values


def uses_transformer_engine() -> bool:
    """Return whether the layers are Transformer Engine's: it can be imported, and the run is not on a CPU."""
    return not cpu.ON_CPU and repairs.have_transformer_engine()


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None, *, transformer_engine: bool | None = None
) -> TransformerBlockSubmodules:
    """Return the layer spec of one model chunk, with the parameter names of Transformer Engine's checkpoints.

    ``transformer_engine``: whether to use Transformer Engine's layers; null uses `uses_transformer_engine`.
    """
    te = uses_transformer_engine() if transformer_engine is None else transformer_engine
    with_attention = copy.copy(config)
    with_attention.experimental_attention_variant = None  # whose layers take their places below
    block = get_gpt_decoder_block_spec(
        with_attention, use_transformer_engine=te, normalization=config.normalization, vp_stage=vp_stage
    )
    if not te:
        for spec in block.layer_specs:
            _complete_local_layer(spec, config)
        if config.normalization == "RMSNorm":
            block.layer_norm = RMSNorm
    if has_rare_layers(config):
        door("architectures").place_layers(block, config, vp_stage, transformer_engine=te)
    return block


def core_attention_class(config: TransformerConfig) -> type[CoreAttention]:
    """Return the class of this program's attention that computes the windows and the sinks of ``config``."""
    varies = config.window_size is not None or has_sinks(config)
    found: type[CoreAttention] = door("architectures").VariantAttention if varies else CoreAttention
    return found


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Return the rows of the output layer: ``vocab_size`` rounded up to a multiple of ``divisible_by * tp_size``."""
    multiple = divisible_by * tp_size
    return math.ceil(vocab_size / multiple) * multiple


def _complete_local_layer(spec: ModuleSpec, config: TransformerConfig) -> None:
    layer, attention = spec.submodules, spec.submodules.self_attention
    attention.submodules.core_attention = core_attention_class(config)
    attention.params = {**(attention.params or {}), "attn_mask_type": AttnMaskType.causal}
    if config.normalization == "RMSNorm":
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            norm = getattr(attention.submodules, name, None)
            if norm is not None and norm is not IdentityOp:
                setattr(attention.submodules, name, RMSNorm)
    if config.multi_latent_attention and config.q_lora_rank is None:
        attention.submodules.q_layernorm = IdentityOp  # of latents, which queries without compression do not have
    # A checkpoint has the names of Transformer Engine's spec, where a norm belongs to the linear layer after it.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.multi_latent_attention:  # three linear layers read the input, so its norm keeps its own name
        names = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    if getattr(older_megatron.submodules_of(layer.mlp), "experts", None) is None:  # a router also reads the norm
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = names
