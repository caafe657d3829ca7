# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What Megatron Core 0.16 gets wrong on any device, set right; each repair says what it mends and when.

Four families: names left undefined where Transformer Engine is absent, the distributed optimizer's
checkpoints where ``torch.optim.AdamW`` does the work (no Transformer Engine, no NVIDIA apex), the MoE
router's padding mask, and weights that the gradient norm counts too often. Nothing here changes a number
that Megatron gets right.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megatron_selfdistill.compat import cpu  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import tensor_parallel


def apply() -> None:
    """Apply every repair that this installation needs, once."""
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    from megatron.core.transformer.moe.router import TopKRouter

    if getattr(TopKRouter, "_selfdistill_repaired", False):
        return
    TopKRouter._selfdistill_repaired = True
    _define_names_missing_without_transformer_engine()
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _load_torch_adam_into_distributed_optimizer(distrib_optimizer.DistributedOptimizer)
    _mask_padding_in_expert_bias_counts(TopKRouter)
    _balance_no_tokens_without_dividing_by_zero()


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is there.  One that cannot be imported (an undefined symbol, say) raises what its
    import does, and is not taken for none: a run would go on with other layers."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformer_engine":
            return False
        raise
    return True


def mark_weights_for_the_norm(model: torch.nn.Module) -> None:
    """Say of each weight whether other tensor-parallel ranks hold another part of it, or the same whole.

    The gradient norm counts a weight on every rank where it is marked ``tensor_model_parallel``, else on one.
    Transformer Engine marks each weight, also those of a linear layer without a ``parallel_mode``, of which latent
    attention has two: the norm would count such a weight once per rank.  Attention sinks are cut by head and biases of
    experts differ from rank to rank, and neither is marked: the norm would count those of one rank.
    """
    for name, module in model.named_modules():
        of_experts = ".experts." in f"{name}."
        replicated = not of_experts and getattr(module, "parallel_mode", "none of Transformer Engine") is None
        for param_name, param in module.named_parameters(recurse=False):
            if replicated:
                param.tensor_model_parallel = False  # type: ignore[attr-defined]
            elif param_name == "softmax_offset" or (of_experts and "bias" in param_name):
                tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
                param.tensor_model_parallel = True  # type: ignore[attr-defined]


def _define_names_missing_without_transformer_engine() -> None:
    """Without Transformer Engine the router, selective recomputation, MLA and shared experts fail."""
    if have_transformer_engine():
        return
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.shared_experts as shared_experts
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention

    for name in "te_general_gemm fused_permute fused_unpermute fused_sort_chunks_by_index".split():
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)
    # Wrongly True without Transformer Engine: the code then asks isinstance(x, None).
    multi_latent_attention.HAVE_TE = shared_experts.HAVE_TE = False
    if not hasattr(random, "FP8GlobalStateManager"):

        class NoFP8:
            """``CheckpointWithoutOutput`` asks whether FP8 is on."""

            @staticmethod
            def is_fp8_enabled() -> bool:
                return False

        random.FP8GlobalStateManager = NoFP8
        random.activation_recompute_forward = lambda *a, **k: contextlib.nullcontext()
        random.fp8_autocast = lambda *a, **k: contextlib.nullcontext()


def _load_torch_adam_into_distributed_optimizer(optimizer_class: Any) -> None:
    """Make the distributed optimizer's state load into ``torch.optim.AdamW``.

    Megatron writes for FusedAdam, whose state holds no ``step``. With torch's AdamW: (1) the state must exist
    before the sharded state dict describes it; (2) the copies must not touch leaves under autograd nor look
    up ``step``; (3) ``load_state_dict`` gives all parameters ONE step tensor, which each update then
    increments once per parameter: silently wrong bias correction from the first resumed step on.
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
                if key != "step" and key in tensors:  # `step` comes with the parameter groups
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
    """0.16.1 combines ``routing_map [tokens, experts]`` with ``padding_mask [tokens]``: a shape error, or
    worse a broadcast when tokens == experts."""
    apply_expert_bias = router_class._apply_expert_bias

    def apply_expert_bias_per_token(self: Any, routing_map: Any, padding_mask: Any = None) -> Any:
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1, 1)
        return apply_expert_bias(self, routing_map, padding_mask)

    router_class._apply_expert_bias = apply_expert_bias_per_token


def _balance_no_tokens_without_dividing_by_zero() -> None:
    """The load-balancing loss of a microbatch that is all padding is 0, not 0 / 0."""
    import megatron.core.transformer.moe.router as router

    loss = router.switch_load_balancing_loss_func

    def loss_of_at_least_one_token(*args: Any, total_num_tokens: Any, **kwargs: Any) -> Any:
        if torch.is_tensor(total_num_tokens):
            total_num_tokens = total_num_tokens.clamp(min=1)
        return loss(*args, total_num_tokens=total_num_tokens, **kwargs)

    router.switch_load_balancing_loss_func = loss_of_at_least_one_token


apply()
