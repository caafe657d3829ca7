# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``model`` of the schema: the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.choices import ACTIVATIONS
from megatron_selfdistill.config.schema.field_checks import Part, require
from megatron_selfdistill.config.schema.ranges import (
    DottedPath,
    NonNegativeFloat,
    OneOf,
    PositiveFloat,
    PositiveInt,
    above,
    at_least,
    at_most,
)

MAX_LAYERS = 10_000
"""The largest number of layers; a plan goes through them one by one."""
Epsilon = Annotated[float, above(0), at_most(1)]


@dataclass(frozen=True)
class YarnConfig(Part, section="model.yarn"):
    """The key ``model.yarn``: how YaRN scales the rotary frequencies of ordinary attention.

    The entries have Megatron Core's names without ``yarn_``.
    """

    rotary_scaling_factor: PositiveFloat = 1.0
    """Factor by which YaRN stretches the sequence."""
    original_max_position_embeddings: PositiveInt = 4096
    """Length of the sequences, in tokens, for which the model was trained before YaRN."""
    beta_fast: PositiveFloat = 32.0
    """Rotations within the original length above which YaRN leaves a frequency as it is."""
    beta_slow: PositiveFloat = 1.0
    """Rotations within the original length below which YaRN divides a frequency by the whole factor."""
    mscale: NonNegativeFloat = 1.0
    """x in the factor 0.1 x log(rotary_scaling_factor) + 1, by which YaRN multiplies queries and keys."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """x in the same expression, by which YaRN divides queries and keys."""
    correction_range_round_to_int: bool = True
    """Whether the channels between which YaRN interpolates are rounded outwards to whole numbers."""


_CUTS_AND_KERNELS = (
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split attention_backend "
    "deterministic_mode cp_comm_type gradient_accumulation_fusion masked_softmax_fusion bias_activation_fusion "
    "bias_dropout_fusion apply_rope_fusion persist_layer_norm memory_efficient_layer_norm moe_grouped_gemm "
    "moe_permute_fusion moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend "
    "moe_shared_expert_overlap cpu_offloading cpu_offloading_num_layers"
)
"""The fields of TransformerConfig that divide the layers and choose the kernels."""


@dataclass(frozen=True)
class ModelConfig(
    Part,
    section="model",
    # The weights do not depend on the padding of the vocabulary or on the longest sequence, except a learned table of
    # positions, which must fit.
    free=" transformer.".join(("make_vocab_size_divisible_by max_position_embeddings", *_CUTS_AND_KERNELS.split())),
):
    """The architecture of the model.

    The keys have the names of Megatron Core's ``TransformerConfig`` and ``GPTModel``.
    """

    provider: DottedPath | None = None
    """Dotted path of a function ``model_provider(pre_process, post_process, vp_stage) -> GPTModel``
    (Megatron-LM's signature); it replaces all keys of the architecture below except ``vocab_size``."""
    vocab_size: PositiveInt | None = None
    """Tokens of the vocabulary, before Megatron's padding; null takes the size of the tokenizer."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The size of the padded vocabulary is a multiple of this number times the tensor-parallel size."""
    num_layers: Annotated[int, at_least(1), at_most(MAX_LAYERS)] = 2
    """Number of transformer layers."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP; null is 4 * hidden_size."""
    num_attention_heads: PositiveInt = 4
    """Number of query heads."""
    num_query_groups: PositiveInt | None = None
    """Number of key and value heads (grouped-query attention); null is num_attention_heads."""
    kv_channels: PositiveInt | None = None
    """Channels per head; null is hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 4096
    """Length of the longest sequence that the model can read, in tokens."""
    position_embedding_type: Annotated[str, OneOf(("rope", "yarn", "learned_absolute", "none"))] = "rope"
    """The encoding of positions: rope, yarn (rope with scaled frequencies), learned_absolute or none."""
    rotary_base: PositiveInt = 10000
    """Base of the rotary frequencies."""
    rotary_percent: Annotated[float, above(0), at_most(1)] = 1.0
    """Share of the channels that the rotary embedding rotates, from 0 to 1."""
    rope_scaling_factor: PositiveFloat | None = None
    """Factor by which the rotary frequencies are stretched as in Llama 3; null is no scaling."""
    seq_len_interpolation_factor: PositiveFloat | None = None
    """Factor by which all rotary positions are divided (linear scaling); null is no scaling."""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    """How YaRN scales the rotary frequencies, with position_embedding_type=yarn."""
    normalization: Annotated[str, OneOf(("RMSNorm", "LayerNorm"))] = "RMSNorm"
    """Kind of all normalisations: RMSNorm or LayerNorm."""
    layernorm_epsilon: Epsilon = 1e-5
    """Epsilon of all normalisations."""
    latent_layernorm_epsilon: Epsilon | None = None
    """Epsilon of the normalisations of the latents in multi-latent attention; null is layernorm_epsilon."""
    gated_linear_unit: bool = True
    """Whether the MLP is gated; with activation silu it is SwiGLU."""
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "silu"
    """Activation of the MLP: silu, gelu (exact, by the error function), gelu_tanh (its tanh approximation) or
    quick_gelu (x times the sigmoid of 1.702 x)."""
    add_bias_linear: bool = False
    """Whether all linear layers have biases."""
    add_qkv_bias: bool = False
    """Whether the query, key and value projections have biases."""
    qk_layernorm: bool = False
    """Whether queries and keys are normalised per head."""
    qk_layernorm_all_heads: bool = False
    """Whether queries and keys are normalised over the channels of all heads together; excludes qk_layernorm."""
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer shares its weights with the word embeddings."""
    init_method_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights of a run that loads no checkpoint."""
    num_moe_experts: PositiveInt | None = None
    """Number of experts in each mixture-of-experts layer; null is a dense model."""
    moe_router_topk: PositiveInt = 2
    """Number of experts that compute each token."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP of one expert; null is ffn_hidden_size."""
    moe_router_enable_expert_bias: bool = False
    """Whether biases of the experts balance the load, without an auxiliary loss."""
    moe_router_score_function: Annotated[str, OneOf(("softmax", "sigmoid"))] = "softmax"
    """Score of the router: softmax, or sigmoid, which expert biases need."""
    num_passthrough_mtp_layers: Annotated[int, at_least(0), at_most(MAX_LAYERS)] = 0
    """Number of multi-token-prediction layers of the checkpoint: they are converted both ways, never built or
    trained."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Further fields of ``TransformerConfig`` by their own names; they override the values that this project derives.
    Experts have no balancing loss without moe_aux_loss_coeff: self-distillation alone should not move the router."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where Megatron would build another model without a word."""
        require(
            not (self.qk_layernorm and self.qk_layernorm_all_heads),
            "model.qk_layernorm normalises each head, model.qk_layernorm_all_heads all heads together: set one of them",
        )
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_attention_heads "
            f"({self.num_attention_heads}), or set model.kv_channels",
        )
        scalings = self.position_embedding_type == "yarn", self.rope_scaling_factor, self.seq_len_interpolation_factor
        require(
            sum(map(bool, scalings)) <= 1,
            "model.position_embedding_type=yarn, model.rope_scaling_factor and model.seq_len_interpolation_factor "
            "scale the same positions: set one of them",
        )
