# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rank grid and its process groups; the only reader of Megatron's ``parallel_state``."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_selfdistill.compat import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import parallel_state, tensor_parallel

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.errors import ConfigError


@dataclass(frozen=True)
class RankGrid:
    """The position of this rank in the layout, and the process groups of this rank, under Megatron's names.

    A *replica* is one data-parallel index: TP x CP x PP ranks that work on the same problems.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    virtual_pipeline_model_parallel_size: int | None
    sequence_parallel: bool

    @property
    def tp_size(self) -> int:
        """The number of tensor-parallel ranks."""
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        """The index of this rank among its tensor-parallel ranks."""
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        """The number of pipeline-parallel ranks."""
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        """The index of this rank among its pipeline-parallel ranks."""
        return self.pp_group.rank()

    @property
    def cp_size(self) -> int:
        """The number of context-parallel ranks."""
        return self.cp_group.size()

    @property
    def cp_rank(self) -> int:
        """The index of this rank among its context-parallel ranks."""
        return self.cp_group.rank()

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks."""
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        """The index of this rank among its data-parallel ranks."""
        return self.dp_group.rank()

    @property
    def ep_size(self) -> int:
        """The number of expert-parallel ranks."""
        return self.ep_group.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank belongs to the last pipeline stage, which has the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last pipeline stage that shares this rank's TP, CP and DP indices."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)

    @property
    def replica_size(self) -> int:
        """The number of the TP x CP x PP ranks that work on the same problems."""
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def replica_rank(self) -> int:
        """The index of this rank among the TP x CP x PP ranks that work on the same problems."""
        return (self.pp_rank * self.cp_size + self.cp_rank) * self.tp_size + self.tp_rank

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank is the first of the TP x CP x PP ranks that work on the same problems."""
        return self.replica_rank == 0

    def first_rank_of(self, replica: int) -> int:
        """Return the global rank of the first rank of a data-parallel replica, on every rank of the world.

        Megatron numbers ranks in the order TP, CP, DP, PP, of which TP is the fastest.
        """
        return replica * self.tp_size * self.cp_size

    @property
    def is_reporter(self) -> bool:
        """Whether this rank prints and writes metrics: rank 0 of the world."""
        return self.rank == 0


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variables of PyTorch's allocator of GPU memory: since torch 2.9 the first name, in all versions the second."""


def expand_segments(variables: MutableMapping[str, str], torch_version: str = torch.__version__) -> None:
    """Let PyTorch's segments of GPU memory grow in place, unless ``variables`` already configures the allocator.

    The lengths of packed sequences change from step to step.  Segments of fixed sizes would leave gaps that no later
    tensor fits into.  NCCL must then not register the buffers of CUDA graphs, for which it takes segments to be fixed.
    The function has an effect only before the first tensor on a GPU.
    """
    variables.setdefault("NCCL_GRAPH_REGISTER", "0")
    if any(variables.get(name) for name in ALLOCATOR_VARIABLES):
        return
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    name = ALLOCATOR_VARIABLES[0 if (major, minor) >= (2, 9) else 1]
    variables[name] = "expandable_segments:True"


def initialize(config: ParallelConfig, seed: int) -> RankGrid:
    """Start torch.distributed (unless it runs already), Megatron's groups and the tensor-parallel random states.

    The backend is gloo on a CPU and NCCL on GPUs, where each rank takes the device LOCAL_RANK.  A process that was
    started by ``python`` without a launcher is a world of one rank.
    """
    if not cpu.ON_CPU:
        expand_segments(os.environ)
    if config.tensor_model_parallel_size > 1:
        # Megatron overlaps a collective with a GEMM by the order of their launch, which a single hardware queue keeps.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        _init_process_group(config)
    if not cpu.ON_CPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _initialize_groups(config, create_gloo_process_groups=not cpu.ON_CPU)  # on CPU every group is gloo already
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current_grid(config)


@contextlib.contextmanager
def imagined(config: ParallelConfig, world_size: int, pp_rank: int) -> Iterator[RankGrid]:
    """Yield the `RankGrid` of the first rank of stage ``pp_rank`` in a world of any size, without other processes.

    The process group is torch's fake group: groups have their real sizes and ranks, and collectives do nothing.  The
    device is ``meta``.  Raises: RuntimeError in a process that already has a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a dry run imagines its process group, but this process already has a real one")
    rank = pp_rank * (world_size // config.pipeline_model_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _initialize_groups(config, create_gloo_process_groups=False)
        yield _grid(config, torch.device("meta"))
    finally:
        shutdown()


def current_grid(config: ParallelConfig) -> RankGrid:
    """Return the `RankGrid` of Megatron's initialised ``parallel_state``."""
    return _grid(config, torch.device("cpu") if cpu.ON_CPU else torch.device("cuda", torch.cuda.current_device()))


def _grid(config: ParallelConfig, device: torch.device) -> RankGrid:
    return RankGrid(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
    )


def shutdown() -> None:
    """Undo `initialize`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _initialize_groups(config: ParallelConfig, create_gloo_process_groups: bool) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(config.distributed_timeout_minutes)),
        create_gloo_process_groups=create_gloo_process_groups,
    )


def _init_process_group(config: ParallelConfig) -> None:
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    backend = "gloo" if cpu.ON_CPU else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    if world_size() != 1:
        raise ConfigError(f"WORLD_SIZE is {world_size()} but RANK is not set: start several ranks with torchrun")
    with socket.socket() as probe:  # any free port: nobody else will connect
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, timeout=timeout)
