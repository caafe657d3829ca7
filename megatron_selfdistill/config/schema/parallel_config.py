# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections parallel, cluster and schedule: how a step is divided over ranks, and what the ranks run on."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_selfdistill.choices import PAIR_ORDERS, RECOMPUTE_GRANULARITIES
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut.  What remains of the world size is data parallelism."""

    tensor_model_parallel_size: int = 1
    """TP: ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """PP: stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VPP: model chunks per stage (the interleaved schedule); null is none."""
    context_parallel_size: int = 1
    """CP: ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """EP: ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """ETP: tensor parallelism inside an expert; null is the same as TP."""
    sequence_parallel: bool = False
    """SP: cut activations between the tensor-parallel regions along the sequence; with MoE and TP it must be
    on."""
    distributed_timeout_minutes: float = 30.0
    """How long a collective may wait before the run ends."""

    def __post_init__(self) -> None:
        normalise("parallel", self)
        axes = "tensor_model pipeline_model context expert_model expert_tensor".split()
        at_least(1, "parallel", self, " ".join(f"{axis}_parallel_size" for axis in axes))
        require(
            self.distributed_timeout_minutes > 0,
            f"parallel.distributed_timeout_minutes must be positive, got {self.distributed_timeout_minutes}",
        )
        vpp = self.virtual_pipeline_model_parallel_size
        if vpp is not None:
            require(
                vpp >= 2,
                f"parallel.virtual_pipeline_model_parallel_size must be null or at least 2, got {vpp}",
            )
            require(
                self.pipeline_model_parallel_size > 1,
                f"parallel.virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1",
            )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel=true needs tensor_model_parallel_size > 1",
        )


@dataclass(frozen=True)
class ClusterConfig:
    """The machine that a run is made for: what dry_run=true without a launch checks it against."""

    num_gpus: int | None = None
    """Ranks of the whole launch, one per GPU; a launch of another size is refused.  Null takes any."""
    gpus_per_node: int = 8
    """GPUs of one node."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, in GiB."""
    reserved_gb: float = 6.0
    """What CUDA, NCCL, an engine's workspace and fragmentation take of it, by the dry run's reckoning, in GiB."""
    host_memory_gb: float = 1000.0
    """Host memory of one node that the tensors of a run may take, in GiB: leave a few GiB per rank for the processes
    themselves."""

    def __post_init__(self) -> None:
        normalise("cluster", self)
        at_least(1, "cluster", self, "num_gpus gpus_per_node")
        at_least(0, "cluster", self, "gpu_memory_gb reserved_gb host_memory_gb")
        num_gpus, per_node = self.num_gpus, self.gpus_per_node
        require(
            num_gpus is None or num_gpus <= per_node or num_gpus % per_node == 0,
            f"cluster.num_gpus ({num_gpus}) must be a multiple of cluster.gpus_per_node ({per_node}), or fit on a node",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How one step runs through the pipeline."""

    pair_order: str | None = None
    """teacher_first, alternating, or null: teacher_first with pipelining, else alternating."""
    max_tokens: int = 8192
    """Token budget of a microbatch: sequences are packed into rows of at most this length."""
    teacher_store_gb: float = 4.0
    """The teacher's hidden rows stay on the device up to this size per rank, and go to pinned host memory
    above it."""
    recompute_granularity: str | None = None
    """Activation recomputation: null, selective or full."""
    recompute_method: str | None = None
    """With full recomputation: uniform or block."""
    recompute_num_layers: int | None = None
    """With full recomputation: layers per unit."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective recomputation: Megatron's module names."""

    def __post_init__(self) -> None:
        normalise("schedule", self)
        if self.pair_order is not None:
            one_of("schedule.pair_order", self.pair_order, PAIR_ORDERS)
        at_least(1, "schedule", self, "max_tokens recompute_num_layers")
        at_least(0, "schedule", self, "teacher_store_gb")
        if self.recompute_granularity is not None:
            one_of("schedule.recompute_granularity", self.recompute_granularity, RECOMPUTE_GRANULARITIES)
