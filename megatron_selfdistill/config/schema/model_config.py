# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section model: the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.choices import ACTIVATIONS, NORMALIZATIONS, POSITION_EMBEDDINGS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class ModelConfig:
    """What the model is.  Field names are Megatron Core's ``TransformerConfig``'s and ``GPTModel``'s."""

    provider: str | None = None
    """Dotted path of a function ``model_provider(pre_process, post_process, vp_stage) -> GPTModel``
    (Megatron-LM's signature); it replaces every architecture field below except ``vocab_size``."""
    vocab_size: int | None = None
    """Valid rows of the output layer, before Megatron's padding; null takes the tokenizer's size."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times the tensor-parallel size."""
    num_layers: int = 2
    """Transformer layers."""
    hidden_size: int = 64
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null is 4 * hidden_size."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); null is num_attention_heads."""
    kv_channels: int | None = None
    """Channels per head; null is hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens, that the model may see."""
    position_embedding_type: str = "rope"
    """rope, learned_absolute or none."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of the channels that rotate."""
    rope_scaling: bool = False
    """Llama 3's frequency scaling."""
    rope_scaling_factor: float = 8.0
    """Factor of Llama 3's frequency scaling."""
    normalization: str = "RMSNorm"
    """RMSNorm or LayerNorm."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every normalisation."""
    gated_linear_unit: bool = True
    """SwiGLU-style MLP (with activation silu)."""
    activation: str = "silu"
    """silu, gelu (exact, by the error function) or gelu_tanh (its tanh approximation); the same on every device."""
    add_bias_linear: bool = False
    """Biases in all linear layers."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the word embeddings."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights, where no checkpoint is loaded."""
    num_moe_experts: int | None = None
    """Experts per MoE layer; null is a dense model."""
    moe_router_topk: int = 2
    """Experts per token."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; null is ffn_hidden_size."""
    moe_aux_loss_coeff: float = 0.0
    """Load-balancing loss; 0 by default, since self-distillation should not move the router by itself."""
    moe_z_loss_coeff: float | None = None
    """Router z-loss; null is none."""
    moe_router_enable_expert_bias: bool = False
    """Auxiliary-loss-free balancing by expert biases."""
    moe_router_score_function: str = "softmax"
    """softmax or sigmoid (sigmoid is what expert biases need)."""
    allow_untested_fp8: bool = False
    """Let ``model.transformer.fp8`` be set, which has never run on hardware here."""
    num_passthrough_mtp_layers: int = 0
    """Multi-token-prediction layers that a checkpoint holds for others: converted both ways, never built or trained."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any further ``TransformerConfig`` field by its own name; it overrides what this project derives."""

    def __post_init__(self) -> None:
        normalise("model", self)
        sizes = "vocab_size make_vocab_size_divisible_by num_layers hidden_size ffn_hidden_size kv_channels"
        at_least(1, "model", self, f"{sizes} num_attention_heads num_query_groups max_position_embeddings")
        at_least(1, "model", self, "num_moe_experts moe_router_topk moe_ffn_hidden_size")
        at_least(0, "model", self, "num_passthrough_mtp_layers")
        one_of("model.normalization", self.normalization, NORMALIZATIONS)
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        if self.kv_channels is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_attention_heads "
                f"({self.num_attention_heads}), or set model.kv_channels",
            )
        groups = self.num_query_groups or self.num_attention_heads
        require(
            self.num_attention_heads % groups == 0,
            f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"model.num_query_groups ({groups})",
        )
