# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``optimizer`` of the schema: how the weights are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.choices import LR_DECAY_STYLES, OPTIMIZERS, PRECISIONS
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.ranges import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    at_least,
    at_most,
)

LearningRate = Annotated[float, at_least(0), at_most(100)]


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's optimizer, its learning rate, and the reduction of gradients over data-parallel ranks."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adam"
    """The optimizer: adam or sgd."""
    precision: Annotated[str, OneOf(PRECISIONS)] = "bf16"
    """Precision of the weights: bf16 (with float32 main parameters) or fp32."""
    lr: LearningRate = 1e-6
    """Learning rate after warm-up."""
    min_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: NonNegativeInt = 0
    """Number of steps of linear warm-up."""
    lr_decay_steps: PositiveInt | None = None
    """Number of steps until the learning rate is min_lr; null is num_steps."""
    lr_decay_style: Annotated[str, OneOf(LR_DECAY_STYLES)] = "constant"
    """Form of the decay: constant, linear, cosine or inverse-square-root."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of Adam."""
    sgd_momentum: Decay = 0.0
    """Momentum of SGD."""
    clip_grad: NonNegativeFloat = 1.0
    """Norm to which larger gradients are clipped; 0 is no clipping."""
    use_distributed_optimizer: bool = True
    """Whether the data-parallel ranks share the state of the optimizer."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced bucket by bucket while backward runs."""
    overlap_param_gather: bool = False
    """Whether parameters are gathered bucket by bucket while forward runs (distributed optimizer only)."""

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
        require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr ({self.min_lr}) must not be above optimizer.lr ({self.lr}), from which it decays",
        )
        require(
            self.optimizer != "sgd" or not self.use_distributed_optimizer,
            "optimizer.optimizer=sgd needs optimizer.use_distributed_optimizer=false: Megatron's distributed optimizer "
            "supports Adam only",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "optimizer.overlap_param_gather=true needs use_distributed_optimizer and overlap_grad_reduce",
        )
