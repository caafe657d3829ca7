# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The norms of Megatron's local layer spec under sequence parallelism, and those of latents with their own epsilon."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """The norm ``x * rsqrt(mean(x^2) + eps) * weight``, with the mean in float32 and the product in the dtype of ``x``.

    The order of operations is that of Hugging Face.  Under ``layernorm_zero_centered_gamma`` the weight is held less
    one, and the product is in float32.  Shapes: ``[..., hidden_size]`` in and out.  Under sequence
    parallelism each rank normalises its own tokens, and ``finalize_model_grads`` sums the gradient of the weight, which
    is marked ``sequence_parallel``, over the tensor-parallel group.
    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Megatron's ``WrappedTorchNorm`` refuses sequence
    parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``."""
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.zero_centered_gamma:  # 1 + weight would lose bits of the weight in bf16
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


class LatentRMSNorm(RMSNorm):
    """The `RMSNorm` of a latent in multi-latent attention, with ``config.latent_layernorm_epsilon`` where it is set."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(config, hidden_size, getattr(config, "latent_layernorm_epsilon", eps), **options)


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
