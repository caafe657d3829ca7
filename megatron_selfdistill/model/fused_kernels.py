# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The activation functions of a model, and the choice of fused kernels.

A kernel is used where it is installed, where Megatron Core supports it for the model, and where it computes the same
function as the layers on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_selfdistill.errors import ConfigError


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of gelu, element by element: Hugging Face's ``gelu_pytorch_tanh``."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Return x times the sigmoid of 1.702 x, element by element: Megatron Core's ``quick_gelu``, which is compiled."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}
"""The function of each value of ``model.activation``, the same on every device."""


@dataclass(frozen=True)
class Installed:
    """The software that this process can use besides PyTorch."""

    cuda: bool
    """Whether the layers run on a GPU."""
    transformer_engine: bool
    """Whether the layers are Transformer Engine's."""

    @property
    def apex(self) -> bool:
        """Whether the run is on a GPU and Megatron Core has imported apex's kernel for weight gradients."""
        return self.cuda and layers._grad_accum_fusion_available

    @property
    def permutation(self) -> bool:
        """Whether Transformer Engine has kernels that sort tokens by expert; those of 2.9 fail with triton 3.5."""
        return self.cuda and self.transformer_engine and is_te_min_version("2.10.0")


def fused_kernels(values: Mapping[str, Any], activation: str, installed: Installed) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` that choose kernels, and the matching ``activation_func``.

    ``values``: the other fields of ``TransformerConfig``, including ``model.transformer``, and
    ``position_embedding_type``.  ``activation``: a key of `ACTIVATIONS`.

    Raises: `ConfigError` where ``model.transformer.bias_activation_fusion=true`` would compute another function.
    """
    te, moe = installed.transformer_engine, values.get("num_moe_experts") is not None
    unfused_because = _no_fused_activation(values, activation)
    fused = values.get("bias_activation_fusion", installed.cuda and unfused_because is None)
    if fused and unfused_because is not None:
        raise ConfigError(
            f"model.transformer.bias_activation_fusion=true is not possible, because {unfused_because}: "
            "set it to false, or do not set it"
        )
    bias_dropout_fusion = installed.cuda and not (moe and te and values.get("add_bias_linear"))
    return {
        # Megatron Core calls the tanh approximation F.gelu where the kernel is fused.
        "activation_func": F.gelu if fused and activation == "gelu_tanh" else ACTIVATIONS[activation],
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": bias_dropout_fusion,  # grouped experts with biases refuse it
        "apply_rope_fusion": te and _fused_rotation_fits(values),
        "persist_layer_norm": te,
        "masked_softmax_fusion": False,
        # Transformer Engine's layers have their own kernel for main_grad; the output layer needs apex's kernel.
        "gradient_accumulation_fusion": te or installed.apex,
        "moe_grouped_gemm": te and moe and not values.get("moe_use_legacy_grouped_gemm"),
        # moe_router_fusion stays false: before 2.14 its kernels compute scores in bf16, so tokens change their experts.
        "moe_permute_fusion": moe and installed.permutation,
    }


def kernel_faults(config: TransformerConfig) -> list[tuple[bool, str]]:
    """Return the kernels that would compute another function, and whether ``config`` has them.

    Each entry is (whether it is found, the message about it).
    """
    return [
        (
            config.bias_activation_fusion
            and config.activation_func_clamp_value is not None
            and config.activation_func in (F.gelu, F.silu),
            "bias_activation_fusion: the fused kernel ignores activation_func_clamp_value: "
            "set model.transformer.bias_activation_fusion=false",
        ),
        (
            getattr(config, "use_transformer_engine_op_fuser", False)  # since 0.18
            and (config.activation_func_clamp_value is not None or config.glu_linear_offset != 0.0),
            "use_transformer_engine_op_fuser ignores activation_func_clamp_value and glu_linear_offset: leave it false",
        ),
    ]


def activation_name(config: TransformerConfig) -> str | None:
    """Return the key of `ACTIVATIONS` whose function the layers of ``config`` compute; None for any other function."""
    if config.activation_func is F.gelu and config.bias_activation_fusion:
        return "gelu_tanh"
    return next((name for name, function in ACTIVATIONS.items() if function is config.activation_func), None)


def kernels_in_use(config: TransformerConfig) -> str:
    """Return a line for the log with the names of the fused kernels of a built model."""
    wgrad = "none"
    if config.gradient_accumulation_fusion:
        wgrad = "all layers (apex)" if layers._grad_accum_fusion_available else "all layers but the output layer"
    parts = [
        f"activation {activation_name(config) or getattr(config.activation_func, '__name__', 'of a provider')}"
        f"{', fused' if config.bias_activation_fusion else ''}",
        f"rotary embedding {'fused' if config.apply_rope_fusion else 'unfused'}",
        f"weight gradients accumulated by the kernel: {wgrad}",
    ]
    if config.num_moe_experts is not None:
        parts.append(f"experts {'in one grouped product' if config.moe_grouped_gemm else 'one after the other'}")
        parts.append(f"permutation of tokens {'fused' if config.moe_permute_fusion else 'unfused'}")
    return f"kernels: {'; '.join(parts)}"


def _no_fused_activation(values: Mapping[str, Any], activation: str) -> str | None:
    """Return why Megatron Core's fused bias and activation do not compute this MLP; None if they compute it."""
    gated, biased = bool(values.get("gated_linear_unit")), bool(values.get("add_bias_linear"))
    moe = values.get("num_moe_experts") is not None
    reasons = [
        (activation == "gelu", "the fused kernel is the tanh approximation, which is model.activation=gelu_tanh"),
        (activation == "silu" and not gated, "silu has a fused kernel in a gated MLP only"),
        (activation == "gelu_tanh" and not gated and not biased, "gelu has a fused kernel in an MLP with biases only"),
        (activation == "gelu_tanh" and moe, "experts have a fused kernel for gated silu only"),
        (activation == "quick_gelu", "the fused kernel of quick_gelu is not used here"),
        (moe and biased, "experts with biases have no fused kernel"),
        (values.get("glu_linear_offset", 0.0) != 0.0, "the fused kernel has no glu_linear_offset"),
        (values.get("activation_func_clamp_value") is not None, "the fused kernel ignores activation_func_clamp_value"),
        (bool(values.get("use_te_activation_func")), "use_te_activation_func chooses another kernel"),
    ]
    return next((reason for found, reason in reasons if found), None)


def _fused_rotation_fits(values: Mapping[str, Any]) -> bool:
    """Return whether Transformer Engine's rotary kernels compute this model's positions in packed sequences."""
    if values.get("rotary_interleaved"):  # Megatron Core does not pass it to the kernel for packed sequences
        return False
    if values.get("position_embedding_type") == "yarn":  # neither does it pass YaRN's factor of queries and keys
        return False
    if values.get("multi_latent_attention"):
        if values.get("rope_type", "yarn") != "yarn" or values.get("cache_mla_latents"):
            return False
        if values.get("qk_pos_emb_head_dim", 64) % 4:
            return False
    return values.get("experimental_attention_variant") != "dsa"
