# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``parallel``, ``cluster``, ``schedule`` and ``optimizer`` of the schema: how Megatron does a step.

Ranks and GPUs share the step, microbatches follow each other, and the optimizer updates the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.choices import GPU_MEMORY_GB, GPUS, PRECISIONS
from megatron_selfdistill.config.schema.field_checks import Part, require
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    Decay,
    DifferentEntries,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Ranks,
    above,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class ParallelConfig(Part, section="parallel", free="*"):
    """The parallel layout of the model; the rest of the world size is data parallelism."""

    tensor_model_parallel_size: Ranks = 1
    """TP: number of ranks that share each layer."""
    pipeline_model_parallel_size: Ranks = 1
    """PP: number of pipeline stages."""
    virtual_pipeline_model_parallel_size: Annotated[int, at_least(2), at_most(2**20)] | None = None
    """VPP: number of model chunks per stage, for the interleaved schedule; null is the plain schedule."""
    context_parallel_size: Ranks = 1
    """CP: number of ranks that share each sequence."""
    expert_model_parallel_size: Ranks = 1
    """EP: number of ranks that share the experts."""
    expert_tensor_parallel_size: Ranks | None = None
    """ETP: number of ranks that share each expert; null is the same as TP."""
    sequence_parallel: bool = False
    """SP: whether the TP ranks divide the activations outside tensor-parallel regions along the sequence.  A mixture of
    experts with TP needs it."""
    distributed_timeout_minutes: Annotated[float, above(0), at_most(MAX_WAIT)] = 30.0
    """Minutes that a collective may wait before the run ends."""


@dataclass(frozen=True)
class ClusterConfig(Part, section="cluster", free="*"):
    """The machines that a run is meant for; dry_run=true without a launch checks the run against them."""

    num_gpus: Ranks | None = None
    """Number of ranks of the launch, one per GPU; a launch of another size is refused.  Null allows any size."""
    gpus_per_node: Ranks = 8
    """Number of GPUs of one node."""
    gpu: Annotated[str, OneOf(GPUS)] = "H100"
    """Kind of GPU: H100, H200 or B200.  It gives the plan its clock, and the memory of one GPU."""
    gpu_memory_gb: NonNegativeFloat | None = None
    """Memory of one GPU, in GiB; null is that of cluster.gpu."""
    host_memory_gb: NonNegativeFloat = 1000.0
    """Host memory of one node that the tensors of a run may take, in GiB.  Subtract a few GiB per rank for the
    processes."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where the plan of a launch would have another number of GPUs."""
        num_gpus, per_node = self.num_gpus, self.gpus_per_node
        require(
            num_gpus is None or num_gpus <= per_node or num_gpus % per_node == 0,
            f"cluster.num_gpus ({num_gpus}) must be at most cluster.gpus_per_node ({per_node}) or a multiple of it",
        )

    @property
    def memory_of_gpu(self) -> float:
        """The memory of one GPU, in GiB."""
        return GPU_MEMORY_GB[self.gpu] if self.gpu_memory_gb is None else self.gpu_memory_gb


@dataclass(frozen=True)
class RecomputeConfig(Part, section="schedule.recompute"):
    """The key ``schedule.recompute``: what backward recomputes, by Megatron's names without ``recompute_``."""

    granularity: Annotated[str, OneOf(("selective", "full"))] | None = None
    """The part that backward recomputes: selective (modules) or full (complete layers); null is nothing."""
    method: Annotated[str, OneOf(("uniform", "block"))] | None = None
    """Megatron's method of full recomputation: uniform or block."""
    num_layers: PositiveInt | None = None
    """Number of layers in a unit of full recomputation."""
    modules: Annotated[list[Name], DifferentEntries()] = field(default_factory=lambda: ["core_attn"])
    """Modules that selective recomputation recomputes, by Megatron's names."""


@dataclass(frozen=True)
class ScheduleConfig(Part, section="schedule", free="*"):
    """The order and the memory of one step in the pipeline."""

    pair_order: Annotated[str, OneOf(("teacher_first", "alternating"))] | None = None
    """Order of the teacher's and the student's microbatches: teacher_first or alternating, which packs both alike; null
    is teacher_first with pipelining and in steps whose teacher's states fit teacher_store_gb, otherwise alternating."""
    max_tokens: PositiveInt = 8192
    """Longest packed sequence of a microbatch, in tokens."""
    teacher_store_gb: NonNegativeFloat = 4.0
    """Size up to which the teacher's hidden states stay on the device, in GiB per rank; larger ones go to pinned host
    memory."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """The activations that backward recomputes instead of keeping them."""


LearningRate = Annotated[float, at_least(0), at_most(100)]


@dataclass(frozen=True)
class LearningRateDecay(Part, section="optimizer.lr_decay"):
    """The key ``optimizer.lr_decay``: the decay of the learning rate, by Megatron's names without ``lr_decay_``."""

    steps: PositiveInt | None = None
    """Number of steps until the learning rate is min_lr; null is num_steps."""
    style: Annotated[str, OneOf(("constant", "linear", "cosine", "inverse-square-root"))] = "constant"
    """Form of the decay: constant, linear, cosine or inverse-square-root."""


@dataclass(frozen=True)
class OptimizerConstants(Part, section="optimizer.constants"):
    """The key ``optimizer.constants``: constants of Adam and SGD, by the names of Megatron's ``OptimizerConfig``."""

    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of Adam."""
    sgd_momentum: Decay = 0.0
    """Momentum of SGD."""


@dataclass(frozen=True)
class OptimizerConfig(
    Part,
    section="optimizer",
    free="precision lr min_lr lr_warmup_steps lr_decay weight_decay constants clip_grad overlap_grad_reduce "
    "overlap_param_gather",
    fixed="optimizer use_distributed_optimizer",
):
    """Megatron's optimizer, its learning rate, and the reduction of gradients over data-parallel ranks."""

    optimizer: Annotated[str, OneOf(("adam", "sgd"))] = "adam"
    """The optimizer: adam or sgd."""
    precision: Annotated[str, OneOf(PRECISIONS)] = "bf16"
    """Precision of the weights: bf16 (with float32 main parameters) or fp32."""
    lr: LearningRate = 1e-6
    """Learning rate after warm-up."""
    min_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Number of steps of linear warm-up; null: a tenth of num_steps, at most 10, and for a run that resumes the number
    with which it began."""
    lr_decay: LearningRateDecay = field(default_factory=LearningRateDecay)
    """The decay of the learning rate from lr to min_lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    constants: OptimizerConstants = field(default_factory=OptimizerConstants)
    """The constants of Adam and SGD."""
    clip_grad: NonNegativeFloat = 1.0
    """Norm to which larger gradients are clipped; 0 is no clipping."""
    use_distributed_optimizer: bool = True
    """Whether the data-parallel ranks share the state of the optimizer."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced bucket by bucket while backward runs."""
    overlap_param_gather: bool = False
    """Whether parameters are gathered bucket by bucket while forward runs (distributed optimizer only)."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where Megatron would gather parameters that nobody has updated."""
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "optimizer.overlap_param_gather=true needs use_distributed_optimizer and overlap_grad_reduce",
        )
