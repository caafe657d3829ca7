# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The norm that Megatron's local layer spec lacks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

ALL_HEADS = "qk_layernorm_all_heads"
"""The attribute of a ``TransformerConfig`` that asks for norms of queries and keys over the channels of all heads."""


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
        """Return the norm of ``x``; PyTorch divides by the root in one kernel on a GPU."""
        if self.zero_centered_gamma:  # 1 + weight would lose bits of the weight in bf16
            return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + self.weight.float())).type_as(x)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight
