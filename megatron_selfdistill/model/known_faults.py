# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The combinations that Megatron Core computes wrongly: a run refuses them before a process group starts.

FP8 has never run on hardware with this program.  Only layers of Transformer Engine compute in FP8.  The output layer
is Megatron Core's own and stays in bf16, so logits and loss are computed as in other runs.
"""

from __future__ import annotations

from megatron_selfdistill.compat import cpu, older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.annexes import door
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.fused_kernels import kernel_faults
from megatron_selfdistill.model.layers import ALL_HEADS

Fault = tuple[bool, str]
"""Whether a configuration has a fault, and the message about the fault."""


def refuse_known_faults(config: TransformerConfig, *, transformer_engine: bool) -> None:
    """Raise `ConfigError`, which says what to do, where Megatron Core would compute wrong numbers, hang or crash.

    ``transformer_engine``: whether the layers are Transformer Engine's.
    """
    for found, message in known_faults(config, transformer_engine=transformer_engine):
        if found:
            raise ConfigError(message)


def known_faults(config: TransformerConfig, *, transformer_engine: bool) -> list[Fault]:
    """Return all faults that `refuse_known_faults` knows, and whether ``config`` has them."""
    rare, vpp = has_rare_layers(config), config.virtual_pipeline_model_parallel_size
    balancing = config.moe_router_load_balancing_type
    return [
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
            config.tp_comm_overlap,
            "tp_comm_overlap needs microbatches of one length and buffers for them: leave it false",
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
        (
            not transformer_engine and config.multi_latent_attention and config.tensor_model_parallel_size > 1,
            "multi-latent attention without Transformer Engine has wrong gradients under tensor parallelism: "
            "install Transformer Engine or use tensor_model_parallel_size=1",
        ),
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
            config.attention_output_gate and config.num_query_groups % config.tensor_model_parallel_size != 0,
            "attention_output_gate needs whole query groups on each tensor-parallel rank: use a "
            "tensor_model_parallel_size that divides num_query_groups",
        ),
        *(door("architectures").layer_faults(config, transformer_engine=transformer_engine) if rare else ()),
        *kernel_faults(config),
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
            "global_aux_loss" in ([balancing] if isinstance(balancing, str) else balancing),
            "moe_router_load_balancing_type=global_aux_loss has a gradient that shrinks with the number of replicas "
            "and depends on the microbatches before it: use aux_loss",
        ),
        (
            bool(config.moe_z_loss_coeff) and (config.sequence_parallel or config.context_parallel_size > 1),
            "moe_z_loss_coeff averages over each rank's own real tokens, so with sequence or context "
            "parallelism it would depend on the place of the padding: set model.transformer.moe_z_loss_coeff=null",
        ),
    ]


def has_sinks(config: TransformerConfig) -> bool:
    """Return whether the softmax of attention has a sink: ``softmax_type`` is learnable or off-by-one."""
    return bool(getattr(config.softmax_type, "value", config.softmax_type) != "vanilla")


def has_rare_layers(config: TransformerConfig) -> bool:
    """Return whether a model has layers of the annex ``architectures``."""
    return bool(
        config.window_size is not None
        or has_sinks(config)
        or config.experimental_attention_variant
        or hasattr(config, ALL_HEADS)
        or hasattr(config, "latent_layernorm_epsilon")
        or (config.num_moe_experts is not None and config.add_bias_linear)
    )
