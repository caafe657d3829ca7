# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Run Megatron Core on a CPU over gloo; import this module before ``megatron.core``.

Megatron Core names CUDA devices, streams and generators in its code, also where the computation does not need CUDA.
`install` replaces those names by their CPU counterparts, so that Megatron's own model, schedules, optimizer and
checkpoints run.  On a machine with CUDA it does nothing.

Each replacement is a plain function: a ``TorchFunctionMode`` would be thread-local, while autograd runs backward on
other threads, and would slow down every operator.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import tempfile
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from megatron_selfdistill.compat import older_megatron

_CPU = torch.device("cpu")

_FACTORIES = (
    "tensor as_tensor empty zeros ones full arange rand randn randint randperm linspace eye empty_strided "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()
_TENSOR_FACTORIES = "new_empty new_zeros new_ones new_full new_tensor".split()


def install() -> bool:
    """Apply every replacement once; return whether this process runs on CPU (False where CUDA is present)."""
    if torch.cuda.is_available():
        return False
    if not getattr(torch, "_selfdistill_cpu", False):
        torch._selfdistill_cpu = True  # type: ignore[attr-defined]
        _replace_factories()
        _replace_tensor_methods()
        _replace_cuda_namespace()
        _replace_collectives()
        _replace_megatron_device_code()
    return True


def _names_cuda(device: Any) -> bool:
    """Return whether ``device`` names a CUDA device, also as a bare index; False for ``meta`` and ``cpu``."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _replace_factories() -> None:
    """Make factories such as ``torch.empty(device="cuda", pin_memory=True)`` create tensors on the CPU.

    Megatron has about 100 such calls.
    """

    def on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return create

    # ``with torch.device("meta")`` looks up its functions at its first use and knows them by identity.  The lookup must
    # come before the replacement: else the context would do nothing, and transformers would load models without their
    # rotary frequencies.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, on_cpu(getattr(torch.Tensor, name)))


def _replace_tensor_methods() -> None:
    tensor, module = torch.Tensor, torch.nn.Module

    def with_cpu_device(method: Any) -> Any:
        @functools.wraps(method)
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(_CPU if _names_cuda(a) else a for a in args)
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            return method(self, *args, **kwargs)

        return to

    tensor.to = with_cpu_device(tensor.to)  # type: ignore[method-assign]
    module.to = with_cpu_device(module.to)  # type: ignore[method-assign]
    tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    tensor.pin_memory = lambda self, *a, **k: self  # type: ignore[method-assign]
    tensor.record_stream = lambda self, *a, **k: None  # type: ignore[method-assign]

    # The optimizers and clip_grads sort parameters by comparing `Tensor.type()` with 'torch.cuda.FloatTensor'.
    native_type = tensor.type

    def cuda_type_name(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return native_type(self, *args, **kwargs)
        return native_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = cuda_type_name  # type: ignore[method-assign]


class _Stream:
    """A replacement for ``torch.cuda.Stream`` and ``Event``; on a CPU all operations run in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        return None

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    wait = wait_stream = wait_event = synchronize = record

    def record_event(self, *args: Any, **kwargs: Any) -> _Stream:
        """Return this object as the event."""
        return self

    def query(self) -> bool:
        """Return True: all operations have ended."""
        return True

    def elapsed_time(self, other: _Stream) -> float:
        """Return 0."""
        return 0.0


def _replace_cuda_namespace() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *a, **k: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    for name in "set_device synchronize empty_cache reset_peak_memory_stats ipc_collect".split():
        setattr(cuda, name, lambda *a, **k: None)
    for name in "memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split():
        setattr(cuda, name, lambda *a, **k: 0)
    cuda.memory_stats = lambda *a, **k: {}
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *a, **k: None


def _replace_collectives() -> None:
    """Give gloo's collectives the split sizes and unequal gathers that Megatron's MoE code needs."""
    barrier, all_to_all_single = dist.barrier, dist.all_to_all_single
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    def all_to_all_single_list_sizes(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # Megatron converts split sizes to NumPy only from a GPU; on a CPU they are tensors.
        sizes = as_list(output_split_sizes), as_list(input_split_sizes)
        return all_to_all_single(output, input, *sizes, group=group, async_op=async_op)

    def all_gather_uneven(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        rows = [t.shape[0] if t.dim() else 0 for t in tensor_list]
        if len(set(rows)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(rows)
        padded = torch.cat([tensor, tensor.new_zeros(longest - tensor.shape[0], *tensor.shape[1:])])
        buffers = [t.new_empty(longest, *t.shape[1:]) for t in tensor_list]
        all_gather(buffers, padded, group=group)
        for out, buffer in zip(tensor_list, buffers, strict=True):
            out.copy_(buffer[: out.shape[0]])
        return None

    def reduce_scatter_uneven(
        output: Any, input_list: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({t.shape for t in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        full = torch.cat(list(input_list))
        dist.all_reduce(full, op=op, group=group)
        first = sum(t.shape[0] for t in input_list[: dist.get_rank(group)])
        output.copy_(full[first : first + output.shape[0]])
        return None

    dist.barrier = lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)
    dist.all_to_all_single = all_to_all_single_list_sizes
    dist.all_gather = all_gather_uneven
    dist.reduce_scatter = reduce_scatter_uneven


def _replace_megatron_device_code() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.tensor_parallel.random as random
    from megatron.core import optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    # Megatron's optimizers take the CUDA kernels of Transformer Engine or apex if one of them is installed.
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    optimizers.Adam, optimizers.SGD, distrib_optimizer.Adam = torch.optim.AdamW, torch.optim.SGD, torch.optim.AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = False

    # The RNG tracker and activation recomputation save and restore the generator of their device.
    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)

    # Since 0.19, recomputation compiles a C++ function that shares memory; a process that is killed meanwhile leaves a
    # lock, for which all later processes wait for ever.
    random._get_share_storage = lambda: _copy_storage

    older_megatron.name_results_queue()

    # torch_dist saving spawns a Manager for its queue, which imports `__main__` again for seconds per rank.
    def results_in_a_file(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = FileQueue()
        return filesystem_async._results_queue

    filesystem_async.get_write_results_queue = results_in_a_file


def _copy_storage(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Give the memory of ``dst``, which all its views share, the size and the contents of that of ``src``."""
    memory, recomputed = dst.untyped_storage(), src.untyped_storage()
    memory.resize_(recomputed.nbytes())
    memory.copy_(recomputed)


class FileQueue:
    """A queue in an unnamed temporary file: the process that makes it reads what it and its forks have put there.

    Unlike the queues of ``multiprocessing`` it needs no thread and no process, and a fork that puts an object of any
    size ends at once.  A fork right after a collective can hang for ever: PyTorch's threads then release tensors, for
    which they take a lock of the interpreter, and CPython 3.11 waits for this lock in the child.
    """

    def __init__(self) -> None:
        with tempfile.NamedTemporaryFile() as file:
            self._writer = Connection(os.open(file.name, os.O_WRONLY), readable=False)
            self._reader = Connection(os.open(file.name, os.O_RDONLY), writable=False)

    def put(self, value: Any) -> None:
        """Append the pickled ``value``; one process puts objects at a time."""
        self._writer.send(value)

    def get_nowait(self) -> Any:
        """Return the next object, or raise ``queue.Empty`` where none is there or a killed process wrote a part."""
        try:
            return self._reader.recv()
        except (EOFError, OSError):
            raise queue.Empty from None


# Megatron would run git in its directory, and take the commit of a project with this environment for its own version.
os.environ.setdefault("NO_VCS_VERSION", "1")
# This comes before torch compiles a function: Megatron's `jit_fuser` is `torch.compile`, which takes seconds each.
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
ON_CPU = install()
