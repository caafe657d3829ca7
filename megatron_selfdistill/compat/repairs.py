# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Repair wrong results of Megatron Core 0.16 on any device; each function describes the fault and its condition.

There are four kinds of faults: names that are undefined without Transformer Engine; checkpoints of the distributed
optimizer with ``torch.optim.AdamW``, which Megatron uses without Transformer Engine and apex; the padding mask of the
MoE router; and weights that the gradient norm counts too often.  No repair changes a number that Megatron computes
correctly.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megatron_selfdistill.compat import cpu, older_megatron  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core import tensor_parallel


def apply() -> None:
    """Apply every repair that this installation needs, once."""
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    from megatron.core.transformer.moe.router import TopKRouter

    if getattr(TopKRouter, "_selfdistill_repaired", False):
        return
    TopKRouter._selfdistill_repaired = True
    older_megatron.name_results_queue()
    _define_names_missing_without_transformer_engine()
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _load_torch_adam_into_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
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
    are cut by head, and biases of experts differ between ranks, but both lack the mark: the norm would count one rank
    only.
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


def mark_replicated_experts(model: torch.nn.Module) -> None:
    """Mark weights of experts that several tensor-parallel ranks hold, so that the gradients of all of them are added.

    Tensor-parallel ranks send different tokens to experts that are not cut (``expert_tensor_parallel_size`` below
    ``tensor_model_parallel_size``).  Megatron Core adds the gradients of an expert over the ranks that hold it only
    where the weight has the mark ``allreduce=False``, which it sets for ``expert_model_parallel_size > 1`` only.
    """
    config = getattr(model, "config", None)
    if config is None or config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for name, param in model.named_parameters():
        if ".experts." in name:
            param.allreduce = False  # type: ignore[attr-defined]


def _define_names_missing_without_transformer_engine() -> None:
    """Define the names without which router, selective recomputation, MLA and shared experts fail.

    They are undefined where Transformer Engine is not installed.
    """
    if have_transformer_engine():
        return
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.shared_experts as shared_experts
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention

    for name in "te_general_gemm fused_permute fused_unpermute fused_sort_chunks_by_index".split():
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)
    # Without Transformer Engine these are wrongly True, and the code calls isinstance(x, None).
    multi_latent_attention.HAVE_TE = shared_experts.HAVE_TE = False
    if not hasattr(random, "FP8GlobalStateManager"):

        class NoFP8:
            """A replacement for the class that ``CheckpointWithoutOutput`` asks about FP8."""

            @staticmethod
            def is_fp8_enabled() -> bool:
                """Return False: there is no FP8 without Transformer Engine."""
                return False

        random.FP8GlobalStateManager = NoFP8
        random.activation_recompute_forward = lambda *a, **k: contextlib.nullcontext()
        random.fp8_autocast = lambda *a, **k: contextlib.nullcontext()


def _load_torch_adam_into_distributed_optimizer(optimizer_class: Any) -> None:
    """Make the distributed optimizer's state load into ``torch.optim.AdamW``.

    Megatron expects FusedAdam, whose state has no ``step``.  With torch's AdamW, (1) the state must exist before the
    sharded state dict describes it; (2) the copies must not touch leaves under autograd nor look up ``step``; (3)
    ``load_state_dict`` gives all parameters one shared step tensor, which each update increments once per parameter, so
    that the bias correction is wrong from the first resumed step on.
    """
    sharded_state_dict, load_state_dict = optimizer_class.sharded_state_dict, optimizer_class.load_state_dict

    def sharded_state_dict_with_state(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)

    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group_index]["params"][group_order]
        with torch.no_grad():
            for key, value in {"param": param, **self.optimizer.state[param]}.items():
                if key != "step" and key in tensors:  # the parameter groups contain `step`
                    value.copy_(tensors[key])

    def load_state_dict_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    optimizer_class.sharded_state_dict = sharded_state_dict_with_state
    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    optimizer_class.load_state_dict = load_state_dict_with_own_steps


def _mask_padding_in_expert_bias_counts(router_class: Any) -> None:
    """Reshape the padding mask of the router for its combination with the routing map.

    Version 0.16.1 combines ``routing_map [tokens, experts]`` with ``padding_mask [tokens]``, which is a shape error, or
    a wrong broadcast when tokens == experts.
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
