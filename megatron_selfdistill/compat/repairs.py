# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Repair wrong results of Megatron Core on any device; each function describes the fault and its condition.

There are three kinds of faults: names that are undefined without Transformer Engine; the padding mask of the MoE
router; and weights that the gradient norm counts too often.  No repair changes a number that Megatron computes
correctly.  A function without "until" repairs the newest version, too, and `older_megatron` has further repairs.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from megatron_selfdistill.compat import cpu, older_megatron  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core import tensor_parallel


def apply() -> None:
    """Apply every repair that this installation needs, once."""
    from megatron.core.transformer.moe.router import TopKRouter

    if getattr(TopKRouter, "_selfdistill_repaired", False):
        return
    TopKRouter._selfdistill_repaired = True
    older_megatron.name_results_queue()
    _define_names_missing_without_transformer_engine()
    if older_megatron.version() < (0, 20):
        _mask_padding_in_expert_bias_counts(TopKRouter)
    _balance_no_tokens_without_dividing_by_zero()
    if older_megatron.version() >= (0, 19):
        _project_queries_without_a_norm()


def have_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed.

    Raises: the exception of its import where the installed Transformer Engine is broken (an undefined symbol, say),
    since the run would otherwise use other layers.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformer_engine":
            return False
        raise
    return True


def mark_weights_for_the_norm(model: torch.nn.Module) -> None:
    """Mark each weight as cut over tensor-parallel ranks or as replicated on them.

    The gradient norm counts a weight with the mark ``tensor_model_parallel`` on every rank, and another weight on one
    rank.  Transformer Engine marks each weight, including the replicated weights of linear layers without a
    ``parallel_mode``, such as two layers of latent attention: the norm would count them once per rank.  Attention sinks
    are cut by head, but lack the mark, and until 0.19 so do biases of experts, which differ between ranks: the norm
    would count one rank only.
    """
    for name, module in model.named_modules():
        of_experts = ".experts." in f"{name}."
        replicated = not of_experts and getattr(module, "parallel_mode", "none of Transformer Engine") is None
        for param_name, param in module.named_parameters(recurse=False):
            if replicated:
                param.tensor_model_parallel = False
            elif param_name == "softmax_offset" or (of_experts and "bias" in param_name):
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
                param.tensor_model_parallel = True


def _define_names_missing_without_transformer_engine() -> None:
    """Define the names that router, selective recomputation and MLA look up, where Transformer Engine is missing."""
    if have_transformer_engine():
        return
    import megatron.core.tensor_parallel.random as random

    older_megatron.name_missing_kernels()
    if not hasattr(random, "FP8GlobalStateManager"):
        # In the place of the class that ``CheckpointWithoutOutput`` asks: there is no FP8 without Transformer Engine.
        random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = lambda *a, **k: contextlib.nullcontext()
        random.fp8_autocast = lambda *a, **k: contextlib.nullcontext()


def _mask_padding_in_expert_bias_counts(router_class: Any) -> None:
    """Reshape the padding mask of the router for its combination with the routing map; until 0.20.

    Megatron combines ``routing_map [tokens, experts]`` with ``padding_mask [tokens]``, which is a shape error, or a
    wrong broadcast when tokens == experts.
    """
    apply_expert_bias = router_class._apply_expert_bias

    def apply_expert_bias_per_token(self: Any, routing_map: Any, padding_mask: Any = None) -> Any:
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1, 1)
        return apply_expert_bias(self, routing_map, padding_mask)

    router_class._apply_expert_bias = apply_expert_bias_per_token


def _balance_no_tokens_without_dividing_by_zero() -> None:
    """Make the load-balancing loss of a microbatch without real tokens 0 instead of 0 / 0."""
    import megatron.core.transformer.moe.router as router

    loss = router.switch_load_balancing_loss_func

    def loss_of_at_least_one_token(*args: Any, total_num_tokens: Any, **kwargs: Any) -> Any:
        if torch.is_tensor(total_num_tokens):
            total_num_tokens = total_num_tokens.clamp(min=1)
        return loss(*args, total_num_tokens=total_num_tokens, **kwargs)

    router.switch_load_balancing_loss_func = loss_of_at_least_one_token


def _project_queries_without_a_norm() -> None:
    """Build the projection of queries that are not compressed as the layer spec names it; since 0.19.

    Version 0.19 puts a norm before it in latent attention with ``qk_layernorm``, which no published model has and
    checkpoints lack; local layers have no such projection, so that their models are refused.
    """
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

    linear = QKNormConfigResolver._mla_fused_linear_or_default

    def linear_of_the_spec(self: Any, module_spec: Any, module_name: str) -> Any:
        return module_spec if module_name == "linear_q_proj" else linear(self, module_spec, module_name)

    QKNormConfigResolver._mla_fused_linear_or_default = linear_of_the_spec


apply()
