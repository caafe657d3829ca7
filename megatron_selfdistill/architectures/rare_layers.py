# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Norms of all heads, norms of latents with an epsilon of their own, and the output of experts with biases.

OLMoE and MiniMax-M2 normalise queries and keys over the channels of all heads.  Megatron's ``qk_layernorm`` normalises
each head by itself.  Tensor parallelism cuts the heads, so a norm over all of them needs the sum of the squares of
every rank.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_selfdistill.model.layers import RMSNorm


class AllHeadsRMSNorm(torch.nn.Module):
    """The norm ``x * rsqrt(mean(x^2) + eps) * weight``, with the mean over the channels of the heads of all TP ranks.

    The mean is taken in float32 and the product in the dtype of ``x``, in the order of operations of Hugging Face.
    Shapes: ``[..., heads / tp, channels]`` in and out.  The weight [heads * channels / tp] is this rank's part of the
    full weight [heads * channels]; its gradient is complete on this rank.

    Collectives over TP: one all-reduce of one float32 number per token in the forward pass, one in the backward pass.
    Source: ``OlmoeRMSNorm`` of transformers; Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, config: TransformerConfig, num_heads: int, channels: int, tp_group: Any) -> None:
        """Make the norm of ``num_heads`` heads in the whole model; the weight begins at 1.

        ``tp_group`` is the tensor-parallel group, whose size divides ``num_heads``.
        """
        super().__init__()
        self.eps, self.tp_group, self.num_channels = config.layernorm_epsilon, tp_group, num_heads * channels
        held = self.num_channels // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(held, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``."""
        values = x.float()
        squares = values.pow(2).sum((-2, -1), keepdim=True)
        if self.tp_group.size() > 1:  # the backward pass also sums: every rank's output depends on each rank's squares
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normed = values * torch.rsqrt(squares / self.num_channels + self.eps)
        return normed.to(x.dtype) * self.weight.view(x.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight as a tensor that is cut along its only axis."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata and "dp_cp_group" in metadata else None,
        )
        return state


class AllHeadsNormAttention(SelfAttention):
    """Megatron's self-attention with an `AllHeadsRMSNorm` of the queries and one of the keys."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        channels, tp_group = self.hidden_size_per_attention_head, self.pg_collection.tp
        self.q_layernorm = AllHeadsRMSNorm(config, config.num_attention_heads, channels, tp_group)
        self.k_layernorm = AllHeadsRMSNorm(config, config.num_query_groups, channels, tp_group)


class LatentRMSNorm(RMSNorm):
    """The `RMSNorm` of a latent in multi-latent attention, with ``config.latent_layernorm_epsilon``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(config, hidden_size, config.latent_layernorm_epsilon, **options)


@functools.cache
def with_latent_epsilon(linear: type[Any]) -> type[Any]:
    """Return ``linear``, a layer that normalises its input with ``config.layernorm_epsilon``, for a latent as input.

    Transformer Engine's layer spec has the norm of a latent in the linear layer after it.  The class in the result
    hands a copy of its configuration with the epsilon of the latents to ``linear``.
    """

    class OfLatent(linear):
        def __init__(self, *args: Any, config: TransformerConfig, **options: Any) -> None:
            own = copy.copy(config)
            own.layernorm_epsilon = own.latent_layernorm_epsilon
            super().__init__(*args, config=own, **options)

    OfLatent.__name__ = OfLatent.__qualname__ = linear.__name__
    return OfLatent


class BiasedExpertOutput(RowParallelLinear):
    """The second linear layer of an expert with a bias, for Megatron's ``linear_fc2`` in its local layer spec.

    Megatron Core's ``MLP`` adds the bias of an expert in place.  The input of that addition is a view that a function
    with its own backward pass made, which autograd refuses; this layer returns a copy.  Megatron Core also marks the
    bias ``sequence_parallel``, and would add the gradients of the different experts of tensor-parallel ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias.sequence_parallel = False

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product [tokens, hidden] without the bias, and the bias [hidden]."""
        output, bias = super().forward(input_)
        return output.clone(), bias
