# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``parallel``, ``cluster`` and ``schedule`` of the schema: how ranks and GPUs share a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_selfdistill.choices import GPU_MEMORY_GB, GPUS, PAIR_ORDERS, RECOMPUTE_GRANULARITIES, RECOMPUTE_METHODS
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    DifferentEntries,
    Name,
    NonNegativeFloat,
    OneOf,
    PositiveInt,
    Ranks,
    above,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class ParallelConfig:
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

    def __post_init__(self) -> None:
        check_fields("parallel", self)
        vpp = self.virtual_pipeline_model_parallel_size
        require(
            vpp is None or self.pipeline_model_parallel_size > 1,
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel=true needs tensor_model_parallel_size > 1",
        )


@dataclass(frozen=True)
class ClusterConfig:
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

    def __post_init__(self) -> None:
        check_fields("cluster", self)
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
class ScheduleConfig:
    """The order and the memory of one step in the pipeline."""

    pair_order: Annotated[str, OneOf(PAIR_ORDERS)] | None = None
    """Order of the teacher's and the student's microbatches: teacher_first or alternating; null is teacher_first with
    pipelining, otherwise alternating."""
    max_tokens: PositiveInt = 8192
    """Longest packed sequence of a microbatch, in tokens."""
    teacher_store_gb: NonNegativeFloat = 4.0
    """Size up to which the teacher's hidden states stay on the device, in GiB per rank; larger ones go to pinned host
    memory."""
    recompute_granularity: Annotated[str, OneOf(RECOMPUTE_GRANULARITIES)] | None = None
    """The part that backward recomputes: selective (recompute_modules) or full (complete layers); null is nothing."""
    recompute_method: Annotated[str, OneOf(RECOMPUTE_METHODS)] | None = None
    """Megatron's method of full recomputation: uniform or block."""
    recompute_num_layers: PositiveInt | None = None
    """Number of layers in a unit of full recomputation."""
    recompute_modules: Annotated[list[Name], DifferentEntries()] = field(default_factory=lambda: ["core_attn"])
    """Modules that selective recomputation recomputes, by Megatron's names."""

    def __post_init__(self) -> None:
        check_fields("schedule", self)
