# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The training steps that are compared: each layout on the device with one rank on a CPU, by support/layouts.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from layouts import ADAM, Case
from models import model_config, parallel

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.model.forward import Fusion

OVERLAPPED = dataclasses.replace(
    ADAM, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)
MLA = {"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 16, "rope_type": "rope"}
MLA |= {"qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
WIDE = {"num_attention_heads": 8, "num_query_groups": 8}
"""Enough heads for TP 8."""
BIASED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
BF16_BOUND = 0.4
"""The largest relative difference of a gradient in bf16 from float32: 0.23 on a CPU, because the weights are large.
A gradient of twice or half its size is off by more."""
BF16_LOSS_BOUND = 0.05
PARAMETER_BOUND = 1e-3
"""The change of each tensor in three steps: a weight near 1 moves by few of its last bits."""


@dataclass(frozen=True)
class Compared:
    """A case, how many ranks it takes, and what must equal the reference."""

    case: Case
    world_size: int = 1
    parameters: bool = False
    """Parameters after three steps instead of the first step's gradients."""
    bound: float | None = None
    """Largest relative difference; None: rounding of float32, which differs between devices."""
    needs: tuple[str, ...] = ()
    """Modules of kernels for GPUs, without which the case is skipped."""

    @property
    def reference(self) -> Case:
        """Return the same case for one CPU rank in float32, uncut, materialised and without recomputation."""
        plain = dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), False)
        optimizer = dataclasses.replace(self.case.optimizer, precision="fp32", **plain)
        uncut = {"parallel": ParallelConfig(), "schedule": ScheduleConfig(), "fusion": None, "extra_weightless": 0}
        return dataclasses.replace(self.case, optimizer=optimizer, **uncut)


def _sgd(**changes: Any) -> OptimizerConfig:
    return dataclasses.replace(Case().optimizer, **changes)


ONE_RANK = {
    "grouped queries": Compared(Case()),
    "tied embeddings": Compared(Case(kind="tied")),
    "mixture of experts with biases": Compared(Case(kind="moe", model_changes=BIASED)),
    "MLA": Compared(Case(model_changes={"transformer": MLA, "num_query_groups": None})),
    "bf16": Compared(Case(optimizer=_sgd(precision="bf16")), bound=BF16_BOUND),
    "fused keep_gradient": Compared(Case(fusion=Fusion("keep_gradient", 16))),
    "fused low_memory": Compared(Case(fusion=Fusion("low_memory", 16))),
    "full recompute": Compared(
        Case(schedule=ScheduleConfig(recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1)))
    ),
    "selective recompute": Compared(
        Case(schedule=ScheduleConfig(recompute=RecomputeConfig(granularity="selective", modules=["core_attn"])))
    ),
    "JSD": Compared(Case(divergence="jsd")),
    "Adam, three steps": Compared(Case(steps=3, optimizer=ADAM), parameters=True),
}
SEVERAL_RANKS = {
    "TP2": Compared(Case(parallel=parallel(tp=2)), 2),
    "TP2+SP, fused keep_gradient": Compared(
        Case(parallel=parallel(tp=2, sp=True), fusion=Fusion("keep_gradient", 16)), 2
    ),
    "PP2": Compared(Case(parallel=parallel(pp=2)), 2),
    "PP2xVPP2 tied": Compared(Case(kind="tied", parallel=parallel(pp=2, vpp=2)), 2),
    "CP2": Compared(Case(parallel=parallel(cp=2)), 2),
    "EP2": Compared(Case(kind="moe", parallel=parallel(ep=2)), 2),
    "DP2 overlapped": Compared(Case(steps=3, optimizer=OVERLAPPED), 2, parameters=True),
    "TP2xPP2+SP": Compared(Case(parallel=parallel(tp=2, pp=2, sp=True)), 4),
    "CP2xTP2+SP": Compared(Case(parallel=parallel(cp=2, tp=2, sp=True)), 4),
    "EP2xPP2": Compared(Case(kind="moe", parallel=parallel(ep=2, pp=2)), 4),
    "DP2xPP2 overlapped": Compared(Case(steps=3, optimizer=OVERLAPPED, parallel=parallel(pp=2)), 4, parameters=True),
}
EIGHT_GPUS = {
    "TP8": Compared(Case(parallel=parallel(tp=8, sp=True), model_changes=WIDE), 8),
    "TP2xPP2xDP2": Compared(Case(parallel=parallel(tp=2, pp=2, sp=True)), 8),
    "CP2 of 8": Compared(Case(parallel=parallel(cp=2)), 8),
    "EP8": Compared(Case(kind="moe", parallel=parallel(ep=8), model_changes={"num_moe_experts": 8}), 8),
    "PP2xVPP2 of 8": Compared(Case(parallel=parallel(pp=2, vpp=2)), 8),
    "DP8 overlapped": Compared(Case(steps=3, optimizer=OVERLAPPED), 8, parameters=True),
}
FUSED_WGRAD = {
    "apex's kernel, materialised": Compared(Case(optimizer=_sgd(precision="bf16")), bound=BF16_BOUND),
    "apex's kernel, fused keep_gradient": Compared(
        Case(optimizer=_sgd(precision="bf16"), fusion=Fusion("keep_gradient", 16)), bound=BF16_BOUND
    ),
    "apex's kernel, float32": Compared(Case()),
}
TE, LINEAR = "transformer_engine", "fla"
HEADS_OF_64: dict[str, Any] = {"num_layers": 2, "kv_channels": 64}
"""Heads of a size that every kernel of attention has, and few layers, which amplify the rounding of bf16 less."""
SINKS = {"softmax_type": "learnable", "window_size": (5, 0), "window_attn_skip_freq": 2}
DELTA_HEADS_OF_64 = model_config("gated_delta").transformer | {"linear_key_head_dim": 64, "linear_value_head_dim": 64}


def _as_a_run(*needs: str, **changes: Any) -> Compared:
    usual: dict[str, Any] = {"optimizer": _sgd(precision="bf16"), "model_changes": HEADS_OF_64}
    return Compared(Case(**usual | changes), bound=BF16_BOUND, needs=needs)


AS_A_RUN = {
    "bf16": _as_a_run(),
    "Transformer Engine": _as_a_run(TE, fusion=Fusion("keep_gradient", 16)),
    "Transformer Engine, experts": _as_a_run(TE, kind="moe"),
    "Transformer Engine, attention sinks": _as_a_run(TE, model_changes=HEADS_OF_64 | {"transformer": SINKS}),
    "flash-linear-attention, gated delta nets": _as_a_run(
        *(LINEAR,),
        kind="gated_delta",
        model_changes=HEADS_OF_64 | {"transformer": DELTA_HEADS_OF_64},
        divergence="forward_kl",
    ),
}
"""The layers that a run on this machine has: Transformer Engine's if it is installed."""
