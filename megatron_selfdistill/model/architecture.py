# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Make Megatron's ``TransformerConfig`` and layer spec from a `ModelConfig`.

The layer spec is Transformer Engine's where it can be imported, else the local spec with our RMSNorm and core
attention. Before a process group starts, this module refuses combinations that Megatron Core computes wrongly.

It also refuses FP8 layers that the user has not allowed, and states the multiples that FP8 needs.  FP8 has never run on
hardware with this program.  Only layers of Transformer Engine compute in FP8.  The output layer is Megatron Core's own
and stays in bf16, so logits and loss are computed as in other runs.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from typing import Any

import torch
import torch.nn.functional as F

from megatron_selfdistill.compat import cpu, older_megatron, repairs  # isort: skip  (before megatron.core)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.attention_variants import has_sinks, window_faults
from megatron_selfdistill.model.flash_sinks import FlashSinkAttention, sink_faults
from megatron_selfdistill.model.fused_kernels import Installed, dispatcher_faults, fused_kernels, kernel_faults
from megatron_selfdistill.model.gated_delta_net import place_gated_delta_nets
from megatron_selfdistill.model.layers import (
    ALL_HEADS,
    BiasedExpertOutput,
    LatentRMSNorm,
    RMSNorm,
    normalise_all_heads,
    with_latent_epsilon,
)
from megatron_selfdistill.model.local_attention import CoreAttention

# Process groups, optimizer and loss are built from these keys, which an override would contradict.
_SET_ELSEWHERE = {
    **{f.name: f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)},
    **dict.fromkeys(["bf16", "fp16", "params_dtype", "pipeline_dtype"], "optimizer.precision"),
}
_Fault = tuple[bool, str]
"""Whether a configuration has a fault, and the message about the fault."""


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> TransformerConfig:
    """Return Megatron's configuration of the model; ``model.transformer`` overrides all other keys.

    Raises: `ConfigError` for a field of ``model.transformer`` that ``TransformerConfig`` lacks or that belongs to
    another section, for values that Megatron Core refuses, and for the faults of `refuse_known_faults`.
    """
    values = _configured_values(model, parallel, optimizer, schedule)
    installed = Installed(cuda=not cpu.ON_CPU, transformer_engine=uses_transformer_engine())
    read_by_kernels = values | model.transformer | {"position_embedding_type": model.position_embedding_type}
    values |= fused_kernels(read_by_kernels, model.activation, installed) | model.transformer
    mla = bool(values.get("multi_latent_attention"))
    cls = MLATransformerConfig if mla else TransformerConfig
    if mla:  # latent attention computes its own rotary embedding
        values = {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent} | values
    known = {f.name for f in dataclasses.fields(cls)}
    for name in model.transformer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model.transformer.{name}: Megatron Core's {cls.__name__} has no such field{hint}")
        if name in _SET_ELSEWHERE:
            raise ConfigError(f"model.transformer.{name} is not allowed: set {_SET_ELSEWHERE[name]}")
    if values.get("window_size") is not None:
        values["window_size"] = tuple(values["window_size"])  # Transformer Engine compares it with tuples
    if values.get("num_moe_experts") and values["add_bias_linear"] and values["expert_tensor_parallel_size"] > 1:
        raise ConfigError(
            "experts with biases cannot be cut: expected parallel.expert_tensor_parallel_size=1, got "
            f"{values['expert_tensor_parallel_size']}, which is parallel.tensor_model_parallel_size where it is not set"
        )
    try:
        config = cls(**values)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"Megatron Core refuses this model: {' '.join(str(error).split())}") from error
    set_attributes(config, model)
    refuse_untrainable_precision(config, transformer_engine=installed.transformer_engine)
    refuse_known_faults(config)
    if model.position_embedding_type in ("rope", "yarn"):
        _check_rotary_width(config, model.rotary_percent)
    return config


def _configured_values(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` from the configuration, without ``model.transformer``."""
    has_experts = model.transformer.get("num_moe_experts", model.num_moe_experts) is not None
    dtype = torch.bfloat16 if optimizer.precision == "bf16" else torch.float32
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": model.gated_linear_unit,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "init_method_std": model.init_method_std,
        "hidden_dropout": 0.0,  # dropout would make the student differ from the sampler
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": optimizer.precision == "bf16",
        "use_cpu_initialization": cpu.ON_CPU,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        # Megatron Core refuses the size for a dense model, which may stand beside a mixture of experts in one run.
        "expert_model_parallel_size": parallel.expert_model_parallel_size if has_experts else 1,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
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


def refuse_known_faults(config: TransformerConfig) -> None:
    """Raise `ConfigError`, which says what to do, where Megatron Core would compute wrong numbers, hang or crash."""
    for found, message in known_faults(config):
        if found:
            raise ConfigError(message)


def known_faults(config: TransformerConfig) -> list[_Fault]:
    """Return all faults that `refuse_known_faults` knows, and whether ``config`` has them."""
    local = not uses_transformer_engine()
    return [
        *_pipeline_faults(config),
        *_loss_faults(config),
        *_attention_faults(config, local),
        *_all_heads_faults(config),
        *kernel_faults(config, transformer_engine=not local),
        *dispatcher_faults(config),
        *_expert_faults(config, local),
    ]


def _pipeline_faults(config: TransformerConfig) -> list[_Fault]:
    vpp = config.virtual_pipeline_model_parallel_size
    return [
        (
            vpp is not None and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm,
            "interleaved pipelining over 2 stages with batch_p2p_comm exchanges the wrong messages: "
            "set model.transformer.batch_p2p_comm=false",
        ),
        (
            cpu.ON_CPU and config.overlap_p2p_comm and config.deallocate_pipeline_outputs,
            "on gloo, overlap_p2p_comm sends buffers that deallocate_pipeline_outputs has already freed: "
            "set model.transformer.deallocate_pipeline_outputs=false",
        ),
    ]


def _loss_faults(config: TransformerConfig) -> list[_Fault]:
    return [
        (
            config.calculate_per_token_loss,
            "calculate_per_token_loss multiplies router losses by tokens per response token; the loss is "
            "already divided by the response tokens of the global batch: leave it false",
        ),
        (
            getattr(config, "defer_embedding_wgrad_compute", False),
            "defer_embedding_wgrad_compute keeps the gradients of whole logit rows, but only response "
            "positions are projected here: leave it false",
        ),
        (
            config.mtp_num_layers is not None,
            "multi-token-prediction layers are not trained: set model.transformer.mtp_num_layers=null",
        ),
        (
            not config.perform_initialization
            and config.tensor_model_parallel_size > 1
            and older_megatron.version() < (0, 18),
            "perform_initialization=false leaves weights unmarked, so that the norm of the gradient counts the part of "
            "one tensor-parallel rank: leave it true",
        ),
        (
            config.hidden_dropout > 0 or config.attention_dropout > 0,
            "dropout makes the trained student differ from the student that sampled: leave "
            "hidden_dropout and attention_dropout at 0",
        ),
    ]


def _attention_faults(config: TransformerConfig, local: bool) -> list[_Fault]:
    return [
        (
            local and config.multi_latent_attention and config.tensor_model_parallel_size > 1,
            "multi-latent attention without Transformer Engine has wrong gradients under tensor parallelism: "
            "install Transformer Engine or use tensor_model_parallel_size=1",
        ),
        *window_faults(config, transformer_engine=not local),
        *sink_faults(config, transformer_engine=not local),
        (
            config.apply_rope_fusion and config.rotary_interleaved,
            "apply_rope_fusion rotates packed sequences as if rotary_interleaved were false: "
            "set model.transformer.apply_rope_fusion=false",
        ),
        (
            config.apply_rope_fusion and _yarn_get_concentration_factor_from_config(config) != 1.0,
            "apply_rope_fusion drops YaRN's factor of queries and keys in packed sequences: "
            "set model.transformer.apply_rope_fusion=false",
        ),
        (
            config.multi_latent_attention and bool(config.no_rope_freq),
            "latent attention ignores no_rope_freq, so every layer rotates: leave model.transformer.no_rope_freq null",
        ),
        (
            config.experimental_attention_variant not in (None, "gated_delta_net"),
            "experimental_attention_variant has layers here for gated_delta_net only: leave it null",
        ),
        (
            config.experimental_attention_variant == "gated_delta_net" and config.activation_func is not F.silu,
            "a gated delta net computes with silu: set model.activation=silu",
        ),
        (
            config.experimental_attention_variant == "gated_delta_net" and config.context_parallel_size > 1,
            "Gated delta net does not support context parallelism here: set parallel.context_parallel_size=1",
        ),
        (
            config.attention_output_gate and config.num_query_groups % config.tensor_model_parallel_size != 0,
            "attention_output_gate needs whole query groups on each tensor-parallel rank: use a "
            "tensor_model_parallel_size that divides num_query_groups",
        ),
    ]


def _all_heads_faults(config: TransformerConfig) -> list[_Fault]:
    normalised, tp = getattr(config, ALL_HEADS, False), config.tensor_model_parallel_size
    return [
        (
            normalised and (config.multi_latent_attention or config.normalization != "RMSNorm"),
            "qk_layernorm_all_heads is an RMSNorm of ordinary attention: set model.normalization=RMSNorm, and leave "
            "model.transformer.multi_latent_attention false",
        ),
        (
            normalised and config.num_query_groups % tp != 0,
            f"qk_layernorm_all_heads counts each key once, but {config.num_query_groups} query groups on {tp} "
            "tensor-parallel ranks are copied: lower parallel.tensor_model_parallel_size",
        ),
    ]


def _expert_faults(config: TransformerConfig, local: bool) -> list[_Fault]:
    return [
        (
            config.moe_expert_capacity_factor is not None
            or getattr(config, "moe_expert_rank_capacity_factor", None) is not None,  # since 0.18
            "moe_expert_capacity_factor drops tokens depending on the rest of the microbatch, so a response's "
            "gradient would depend on packing: leave it and moe_expert_rank_capacity_factor null",
        ),
        (
            config.num_moe_experts is not None and getattr(config, "mlp_chunks_for_training", 1) > 1,  # since 0.18
            "mlp_chunks_for_training routes padding as if it were tokens, and adds a balancing loss for each chunk: "
            "leave it 1",
        ),
        (
            "global_aux_loss" in _balancing_types(config),
            "moe_router_load_balancing_type=global_aux_loss has a gradient that shrinks with the number of replicas "
            "and depends on the microbatches before it: use aux_loss",
        ),
        (
            bool(config.moe_z_loss_coeff) and (config.sequence_parallel or config.context_parallel_size > 1),
            "moe_z_loss_coeff averages over each rank's own real tokens, so with sequence or context "
            "parallelism it would depend on the place of the padding: set model.transformer.moe_z_loss_coeff=null",
        ),
    ]


def _balancing_types(config: TransformerConfig) -> list[str]:
    types = config.moe_router_load_balancing_type
    return [types] if isinstance(types, str) else list(types)


def _check_rotary_width(config: TransformerConfig, rotary_percent: float) -> None:
    """Raise `ConfigError` unless the rotated channels, ``rotary_percent`` of a head, are pairs."""
    if config.multi_latent_attention:
        name, channels = "model.transformer.qk_pos_emb_head_dim", config.qk_pos_emb_head_dim
        width = channels
    else:
        name, channels = "model.kv_channels", config.kv_channels
        width = int(channels * rotary_percent)
    if width + width % 2 > channels:
        raise ConfigError(
            f"rotary embeddings rotate pairs of channels: expected an even {name} (by default model.hidden_size / "
            f"model.num_attention_heads), got {channels}"
        )


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
    if te and hasattr(config, "latent_layernorm_epsilon"):
        for spec in block.layer_specs:
            give_latents_their_epsilon(spec)
    if te and has_sinks(config):
        for spec in block.layer_specs:
            spec.submodules.self_attention.submodules.core_attention = FlashSinkAttention
    if not te:
        for spec in block.layer_specs:
            _complete_local_layer(spec, config)
        if config.normalization == "RMSNorm":
            block.layer_norm = RMSNorm
    normalise_all_heads(block, config)
    place_gated_delta_nets(block, config, vp_stage, transformer_engine=te)
    return block


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Return the rows of the output layer: ``vocab_size`` rounded up to a multiple of ``divisible_by * tp_size``."""
    multiple = divisible_by * tp_size
    return math.ceil(vocab_size / multiple) * multiple


def give_latents_their_epsilon(spec: ModuleSpec) -> None:
    """Let the norms of the latents in a layer of Transformer Engine's spec have their own epsilon."""
    attention = spec.submodules.self_attention.submodules
    for name in ("linear_q_up_proj", "linear_kv_up_proj"):
        setattr(attention, name, with_latent_epsilon(getattr(attention, name)))


def _complete_local_layer(spec: ModuleSpec, config: TransformerConfig) -> None:
    layer, attention = spec.submodules, spec.submodules.self_attention
    attention.submodules.core_attention = CoreAttention
    attention.params = {**(attention.params or {}), "attn_mask_type": AttnMaskType.causal}
    if config.normalization == "RMSNorm":
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            norm = getattr(attention.submodules, name, None)
            if norm is not None and norm is not IdentityOp:
                of_latent = config.multi_latent_attention
                setattr(attention.submodules, name, LatentRMSNorm if of_latent else RMSNorm)
    if config.multi_latent_attention and config.q_lora_rank is None:
        attention.submodules.q_layernorm = IdentityOp  # of latents, which queries without compression do not have
    # A checkpoint has the names of Transformer Engine's spec, where a norm belongs to the linear layer after it.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.multi_latent_attention:  # three linear layers read the input, so its norm keeps its own name
        names = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    experts = getattr(older_megatron.submodules_of(layer.mlp), "experts", None)
    if experts is None:  # a router also reads the norm
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    elif config.add_bias_linear:
        older_megatron.submodules_of(experts).linear_fc2 = BiasedExpertOutput
    layer.sharded_state_dict_keys_map = names


def set_attributes(config: TransformerConfig, model: ModelConfig) -> None:
    """Set YaRN's attributes on ``config``, the epsilon of latents and the norms of all heads, where ``model`` has them.

    Raises: `ConfigError` for values that do not fit the rest of the model or the layout.
    """
    if model.position_embedding_type == "yarn":
        _set_yarn(config, model)
    if model.latent_layernorm_epsilon is not None:
        _set_latent_epsilon(config, model.latent_layernorm_epsilon)
    if model.qk_layernorm_all_heads:
        setattr(config, ALL_HEADS, True)


def _set_yarn(config: TransformerConfig, model: ModelConfig) -> None:
    """Set the attributes that Megatron Core's ``GPTModel`` and ``Attention`` read."""
    if config.multi_latent_attention:
        raise ConfigError(
            "model.position_embedding_type=yarn is for ordinary attention: latent attention has its own YaRN, "
            "model.transformer.rope_type=yarn"
        )
    original, parts = model.yarn.original_max_position_embeddings, 2 * config.context_parallel_size
    if config.context_parallel_size > 1 and original % parts:
        raise ConfigError(
            f"model.yarn.original_max_position_embeddings={original} must be a multiple of {parts}, twice "
            "parallel.context_parallel_size: Megatron Core cuts a table of this length"
        )
    for name, value in dataclasses.asdict(model.yarn).items():
        setattr(config, f"yarn_{name}", value)


def _set_latent_epsilon(config: TransformerConfig, epsilon: float) -> None:
    """Set the attribute that `norms.LatentRMSNorm` and `norms.with_latent_epsilon` read."""
    if not (config.multi_latent_attention and config.normalization == "RMSNorm"):
        raise ConfigError(
            "model.latent_layernorm_epsilon is for multi-latent attention with model.normalization=RMSNorm: do not set "
            "it for this model"
        )
    config.latent_layernorm_epsilon = epsilon


def refuse_untrainable_precision(config: TransformerConfig, *, transformer_engine: bool) -> None:
    """Raise `ConfigError` for layers in FP8 or FP4 that cannot be trained.

    ``transformer_engine``: whether the layers are Transformer Engine's.
    """
    faults = [
        (
            bool(config.fp4) or config.use_kitchen,
            "fp4 and kitchen's quantisation have never been tried with self-distillation: unset model.transformer.fp4 "
            "and model.transformer.use_kitchen",
        ),
        (
            bool(config.fp8) and not transformer_engine,
            f"fp8={config.fp8} needs a GPU and Transformer Engine's layers, but this run has Megatron's local layers: "
            "do not set model.transformer.fp8",
        ),
        (
            config.fp8_param,
            "fp8_param keeps the parameters in fp8, which teachers, checkpoints and samplers cannot read: set "
            "model.transformer.fp8_param=false, which keeps the matrix products in fp8",
        ),
        (
            getattr(config, "fp8_output_proj", False),  # since 0.18
            "fp8_output_proj computes the logits of the loss in fp8, which samplers compute in bf16: leave it false",
        ),
    ]
    for found, message in faults:
        if found:
            raise ConfigError(message)
