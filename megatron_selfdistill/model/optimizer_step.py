# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Make one step of Megatron's optimizer in two halves, so that a run can check the norm of the gradient in between.

    norm = gradient_norm(optimizer)        # prepares the gradients
    ...                                    # a guard may refuse to apply them
    apply_gradients(optimizer, norm)

``optimizer.step()`` would prepare the gradients and compute their norm a second time.
"""

from __future__ import annotations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients for `apply_gradients`, and return their 2-norm before clipping.

    Collectives: one sum over the ranks that share a model, or over the world where optimizer states are distributed;
    the host waits for it.

    Raises: RuntimeError for an overflowed loss scale, which bf16 and fp32 do not have.
    """
    if optimizer.prepare_grads():
        raise RuntimeError("gradients overflowed their loss scale; expected bf16 or fp32, which have no loss scale")
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the prepared gradients by ``norm``, the result of `gradient_norm`, and update the parameters.

    The updated parameters equal those of ``optimizer.step()`` bit for bit.

    Collectives: the gather of updated parameters that Megatron's distributed optimizer makes.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
