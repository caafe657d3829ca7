# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``parallel``, ``cluster`` and ``schedule`` of the schema: how ranks and GPUs share a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_selfdistill.choices import PAIR_ORDERS, RECOMPUTE_GRANULARITIES
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class ParallelConfig:
    """The parallel layout of the model; the rest of the world size is data parallelism."""

    tensor_model_parallel_size: int = 1
    """TP: number of ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """PP: number of pipeline stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VPP: number of model chunks per stage, for the interleaved schedule; null is the plain schedule."""
    context_parallel_size: int = 1
    """CP: number of ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """EP: number of ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """ETP: number of ranks that share each expert; null is the same as TP."""
    sequence_parallel: bool = False
    """SP: whether the TP ranks divide the activations outside tensor-parallel regions along the sequence.  A mixture of
    experts with TP needs it."""
    distributed_timeout_minutes: float = 30.0
    """Minutes that a collective may wait before the run ends."""

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
    """The machines that a run is meant for; dry_run=true without a launch checks the run against them."""

    num_gpus: int | None = None
    """Number of ranks of the launch, one per GPU; a launch of another size is refused.  Null allows any size."""
    gpus_per_node: int = 8
    """Number of GPUs of one node."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, in GiB."""
    reserved_gb: float = 6.0
    """Memory of one GPU that the dry run reserves for CUDA, NCCL, an engine's workspace and fragmentation, in GiB."""
    host_memory_gb: float = 1000.0
    """Host memory of one node that the tensors of a run may take, in GiB.  Subtract a few GiB per rank for the
    processes."""

    def __post_init__(self) -> None:
        normalise("cluster", self)
        at_least(1, "cluster", self, "num_gpus gpus_per_node")
        at_least(0, "cluster", self, "gpu_memory_gb reserved_gb host_memory_gb")
        num_gpus, per_node = self.num_gpus, self.gpus_per_node
        require(
            num_gpus is None or num_gpus <= per_node or num_gpus % per_node == 0,
            f"cluster.num_gpus ({num_gpus}) must be at most cluster.gpus_per_node ({per_node}) or a multiple of it",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The order and the memory of one step in the pipeline."""

    pair_order: str | None = None
    """Order of the teacher's and the student's microbatches: teacher_first or alternating; null is teacher_first with
    pipelining, otherwise alternating."""
    max_tokens: int = 8192
    """Longest packed sequence of a microbatch, in tokens."""
    teacher_store_gb: float = 4.0
    """Size up to which the teacher's hidden states stay on the device, in GiB per rank; larger ones go to pinned host
    memory."""
    recompute_granularity: str | None = None
    """The part that backward recomputes: selective (recompute_modules) or full (complete layers); null is nothing."""
    recompute_method: str | None = None
    """Megatron's method of full recomputation: uniform or block."""
    recompute_num_layers: int | None = None
    """Number of layers in a unit of full recomputation."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Modules that selective recomputation recomputes, by Megatron's names."""

    def __post_init__(self) -> None:
        normalise("schedule", self)
        if self.pair_order is not None:
            one_of("schedule.pair_order", self.pair_order, PAIR_ORDERS)
        at_least(1, "schedule", self, "max_tokens recompute_num_layers")
        at_least(0, "schedule", self, "teacher_store_gb")
        if self.recompute_granularity is not None:
            one_of("schedule.recompute_granularity", self.recompute_granularity, RECOMPUTE_GRANULARITIES)
