# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A c10d backend for tests: collectives of CUDA tensors through host memory and gloo.

NCCL refuses two ranks on one GPU.  With this backend, TP, PP, VPP, CP, EP and DP run on one: models, kernels and
streams are those of a GPU, and NCCL alone is replaced.  CPU tensors take the same way through copies.

    import tests.gpu.staged
    dist.init_process_group("staged", store=..., rank=..., world_size=...)

As with NCCL, a call starts when the work of the current stream is done, and its result is there for the stream on which
``wait`` is called, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, Work

NAME = "staged"


class _StagedWork(Work):
    """Works of gloo that run, and the copies to make when they are done."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], None] | None, kept: Any) -> None:
        super().__init__()
        self._works, self._finish, self._kept = list(works), finish, kept

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the collective is done, then copy its result on the current stream."""
        for work in self._works:
            work.wait() if timeout is None or not timeout else work.wait(timeout)
        if self._finish is not None:
            self._finish()
        self._works, self._finish, self._kept = [], None, None
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed()

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([])
        return future


class StagedGroup(dist.ProcessGroup):
    """A process group whose collectives copy to host memory, run over gloo and copy back."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = ProcessGroupGloo(store, rank, size, timeout)
        self._sent: list[tuple[Any, Tensor]] = []
        self._num_calls = 0

    def getBackendName(self) -> str:
        return NAME

    def _get_backend_name(self) -> str:
        return NAME

    def _set_sequence_number_for_group(self) -> None:
        self._num_calls = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._num_calls

    def shutdown(self) -> None:
        self._sent.clear()

    abort = shutdown

    # -- one tensor on each rank -------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _StagedWork:
        average = _summing(opts)
        hosts = [_host(tensor) for tensor in tensors]
        works = [self._gloo.allreduce([host], opts or AllreduceOptions()) for host in hosts]
        return self._work(works, _back(tensors, hosts, self.size() if average else 1))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> _StagedWork:
        plain = AllreduceOptions()
        if opts is not None:
            plain.reduceOp = opts.reduceOp
        return self.allreduce(tensors, plain)

    def reduce(self, tensors: list[Tensor], opts: Any) -> _StagedWork:
        average = _summing(opts)
        hosts = [_host(tensor) for tensor in tensors]
        works = [self._gloo.reduce([host], opts) for host in hosts]
        back = _back(tensors, hosts, self.size() if average else 1)
        return self._work(works, back if opts.rootRank == self.rank() else None, hosts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> _StagedWork:
        hosts = [_host(tensor) for tensor in tensors]
        return self._work([self._gloo.broadcast([host], opts) for host in hosts], _back(tensors, hosts))

    def barrier(self, opts: Any = None) -> _StagedWork:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._work([self._gloo.barrier()], None)

    # -- a list, or one large tensor, for all ranks ------------------------------------------------------------------

    def allgather(self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _StagedWork:
        """Gather tensors of any sizes, which every rank knows from its own list of outputs."""
        works, backs = [], []
        for outputs, tensor in zip(output_lists, inputs, strict=True):
            longest = max(output.numel() for output in outputs)
            own = _host(tensor).flatten()
            own = torch.cat([own, own.new_zeros(longest - own.numel())])
            hosts = [own.new_empty(longest) for _ in outputs]
            works.append(self._gloo.allgather([hosts], [own]))
            backs.append(_back(outputs, hosts))
        return self._work(works, lambda: [back() for back in backs])

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> _StagedWork:
        parts = [list(output.view(-1).chunk(self.size())) for output in outputs]
        return self.allgather(parts, inputs)

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> _StagedWork:
        return self.allgather_into_tensor_coalesced([output], [tensor])

    def reduce_scatter(self, outputs: list[Tensor], input_lists: list[list[Tensor]], opts: Any) -> _StagedWork:
        """Sum lists of any sizes over the ranks, of which each keeps its own element."""
        average, plain = _summing(opts), AllreduceOptions()
        plain.reduceOp = opts.reduceOp
        hosts = [torch.cat([_host(tensor).flatten() for tensor in tensors]) for tensors in input_lists]
        works = [self._gloo.allreduce([host], plain) for host in hosts]
        kept = []
        for host, tensors in zip(hosts, input_lists, strict=True):
            kept.append(host.split([tensor.numel() for tensor in tensors])[self.rank()])
        return self._work(works, _back(outputs, kept, self.size() if average else 1))

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> _StagedWork:
        return self.reduce_scatter(outputs, [list(tensor.reshape(-1).chunk(self.size())) for tensor in inputs], opts)

    def _reduce_scatter_base(self, output: Tensor, tensor: Tensor, opts: Any) -> _StagedWork:
        return self.reduce_scatter_tensor_coalesced([output], [tensor], opts)

    def alltoall_base(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> _StagedWork:
        host, received = _host(tensor), _host(output)
        work = self._gloo.alltoall_base(received, host, output_sizes, input_sizes)
        return self._work([work], _back([output], [received]), host)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> _StagedWork:
        sent = torch.cat([_host(tensor).flatten() for tensor in inputs])
        sizes = [output.numel() for output in outputs]
        received = sent.new_empty(sum(sizes))
        work = self._gloo.alltoall_base(received, sent, sizes, [tensor.numel() for tensor in inputs])
        return self._work([work], _back(outputs, received.split(sizes)), sent)

    # -- from one rank to another ------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> _StagedWork:
        (tensor,) = tensors
        host = _host(tensor)
        work = self._gloo.send([host], rank, tag)
        # Gloo reads the buffer until the receiver has the data, also if nothing waits for this work.
        self._sent = [(other, buffer) for other, buffer in self._sent if not other.is_completed()]
        self._sent.append((work, host))
        return self._work([work], None, host)

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> _StagedWork:
        hosts = [_host(tensor) for tensor in tensors]
        return self._work([self._gloo.recv(hosts, rank, tag)], _back(tensors, hosts))

    # Later versions of torch have other names for the same collectives.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    def _work(self, works: Sequence[Any], finish: Callable[[], Any] | None, kept: Any = None) -> _StagedWork:
        self._num_calls += 1
        return _StagedWork(works, finish, kept)


def _host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory; gloo knows no bool, which becomes uint8."""
    copy = tensor.detach().to("cpu", copy=True).contiguous()
    return copy.view(torch.uint8) if copy.dtype == torch.bool else copy


def _back(tensors: Sequence[Tensor], hosts: Sequence[Tensor], divisor: int = 1) -> Callable[[], None]:
    """Return what copies each host tensor, cut to its target's number of elements, into the target."""

    @torch.no_grad()
    def copy() -> None:
        for tensor, host in zip(tensors, hosts, strict=True):
            flat = host.flatten()[: tensor.numel()]
            flat = flat.view(torch.bool) if tensor.dtype == torch.bool else flat
            tensor.detach().copy_(flat.view(tensor.shape))
            if divisor != 1:
                tensor.detach().div_(divisor)

    return copy


def _summing(opts: Any) -> bool:
    """Turn the average, which gloo does not know, into a sum; return whether it was one."""
    if opts is None or opts.reduceOp != dist.ReduceOp.AVG:
        return False
    opts.reduceOp = dist.ReduceOp.SUM
    return True


if NAME.upper() not in dist.Backend._plugins:
    dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
