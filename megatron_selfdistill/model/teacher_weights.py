# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The weights that teach: those at the start of the run, their moving average, or the current ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_selfdistill.model.forward import unwrapped

Chunks = list[torch.nn.Module]
"""The chunks of one model on a rank."""


class Teacher:
    """The teacher's chunks on this rank, cut like the student's chunks.

    With ``frozen`` and ``ema`` the teacher is a copy in the dtype of the parameters.  With ``ema`` there is also a
    float32 master copy, because an average in bf16 never moves: its step is below half a unit in the last place.  With
    ``current`` the teacher is the student.  A student that trains a part of its weights computes with those at the
    start itself, so that its frozen teacher is no copy.  With ``offload`` the copy stays in pinned host memory, and is
    on the device only within `on_device`.
    """

    def __init__(
        self,
        weights: str,
        student: Sequence[torch.nn.Module],
        build_chunks: Callable[[], Chunks],
        *,
        ema_decay: float = 0.99,
        offload: bool = False,
        start: Chunks | None = None,
    ) -> None:
        """Make the teacher; ``start``: the student's own chunks with the weights at the start, null if it has none."""
        self.weights, self.ema_decay = weights, ema_decay
        self.student = list(student)
        self.is_copy = weights != "current" and start is None
        """Whether the teacher has weights of its own."""
        self.offload = offload and self.is_copy
        self.chunks = build_chunks() if self.is_copy else self.student
        if start is not None and weights == "frozen":
            self.chunks = start
        self.masters: list[Tensor] = []
        self._resting: list[Tensor] = []
        if self.is_copy:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
                chunk.eval()
            self.copy_student()

    def copy_student(self) -> None:
        """Copy the student's present weights, at the start of a run after its checkpoint was loaded."""
        if not self.is_copy:
            return
        with torch.no_grad(), self.on_device(keep=True):
            for mine, theirs in self._pairs():
                mine.copy_(theirs)
            self._copy_buffers()
        self._weights_changed()
        if self.weights == "ema":
            rests = torch.device("cpu") if self.offload else None
            self.masters = [mine.detach().to(rests, torch.float32) for mine, _ in self._pairs()]

    def update(self, optimizer: MegatronOptimizer) -> None:
        """Update an ``ema`` teacher after a step of the optimizer; do nothing for other teachers.

        The master becomes decay * master + (1 - decay) * the optimizer's float32 main parameter, and the copy becomes
        the master in its dtype.  Buffers (expert biases) are copied.

        Collectives: under the distributed optimizer one all-reduce per bf16 parameter over the ranks that share the
        parameter.
        """
        if self.weights != "ema":
            return
        with torch.no_grad(), self.on_device(keep=True):
            for master, (mine, theirs) in zip(self.masters, self._pairs(), strict=True):
                master.lerp_(main_parameter(theirs, optimizer).to(master.device), 1.0 - self.ema_decay)
                mine.copy_(master)
            self._copy_buffers()
        self._weights_changed()

    @contextlib.contextmanager
    def on_device(self, keep: bool = False) -> Iterator[Chunks]:
        """Yield the chunks on the device.

        With ``offload`` the chunks leave the device at the end, and changes are kept only with ``keep``.
        """
        if not self.offload:
            yield self.chunks
            return
        params = [p for chunk in self.chunks for p in chunk.parameters()]
        if self._resting:
            for param, host in zip(params, self._resting, strict=True):
                param.data = host.to(torch.cuda.current_device(), non_blocking=True, copy=True)
        try:
            yield self.chunks
        finally:
            if not self._resting:
                self._resting = [torch.empty_like(p, device="cpu", pin_memory=True) for p in params]
                keep = True
            for param, host in zip(params, self._resting, strict=True):
                if keep:
                    host.copy_(param.detach())
                param.data = host

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the teacher's tensors for a checkpoint, shared and not copied; empty without weights of its own.

        The tensors are the float32 masters for ``ema`` and the copy for ``frozen``.  Their keys begin with
        ``teacher.``.
        """
        if not self.is_copy:
            return {}
        with self.masters_in_place():
            state = {}
            for index, chunk in enumerate(self.chunks):
                state[f"teacher{index}"] = _detached(unwrapped(chunk).sharded_state_dict(prefix="teacher."))
            return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy ``state``, the loaded tensors of `sharded_state_dict`, into the teacher."""
        if not self.is_copy:
            return
        with torch.no_grad(), self.on_device(keep=True):
            with self.masters_in_place():
                for index, chunk in enumerate(self.chunks):
                    loaded = {k.removeprefix("teacher."): v for k, v in state[f"teacher{index}"].items()}
                    unwrapped(chunk).load_state_dict(loaded)
            for master, (mine, _) in zip(self.masters, self._pairs(), strict=False):
                mine.copy_(master)
        self._weights_changed()

    @contextlib.contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """Make the float32 masters the data of the parameters, so that Megatron's state dicts describe the masters."""
        params = [mine for mine, _ in self._pairs()]
        data = [p.data for p in params]
        for param, master in zip(params, self.masters, strict=False):  # only ema has masters
            param.data = master
        try:
            yield
        finally:
            for param, own in zip(params, data, strict=True):
                param.data = own

    def _weights_changed(self) -> None:
        """Make FP8 layers quantise their weights again.

        FP8 layers keep quantised weights until this flag is set; a schedule sets the flag for the student only.
        """
        for chunk in self.chunks:
            unwrapped(chunk).set_is_first_microbatch()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for mine, theirs in zip(self.chunks, self.student, strict=True):
            yield from zip(unwrapped(mine).parameters(), unwrapped(theirs).parameters(), strict=True)

    def _copy_buffers(self) -> None:
        for mine, theirs in zip(self.chunks, self.student, strict=True):
            for a, b in zip(unwrapped(mine).buffers(), unwrapped(theirs).buffers(), strict=True):
                if a.dtype != b.dtype:  # a router casts its bf16 bias to float32 in its first run
                    a.data = a.data.to(b.dtype)
                a.copy_(b)


def main_parameter(param: Tensor, optimizer: MegatronOptimizer) -> Tensor:
    """Return the full float32 main parameter of ``param``, in its shape, on every rank.

    In float32 training the parameter is its own main parameter, which ``overlap_param_gather`` gathers later.  Until
    then the distributed optimizer, like that of bf16 parameters, has new values of the slices of its own data-parallel
    rank alone; the other ranks add zeros, which is exact.
    """
    main: Tensor = param if param.dtype == torch.float32 else param.main_param  # type: ignore[attr-defined]
    owner = _distributed_optimizer_of(param, optimizer)
    if owner is None or (main is param and not owner.ddp_config.overlap_param_gather):
        return main.detach().view_as(param)
    full = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if param in owner.model_param_gbuf_map:  # this rank holds a slice
        own = owner._get_model_param_range_map(param)["param"]
        full[own.start : own.end] = main.detach().view(-1)[own.start : own.end] if main is param else main
    dist.all_reduce(full, group=owner.data_parallel_group)
    return full.view(param.shape)


def _distributed_optimizer_of(param: Tensor, optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """Return the distributed optimizer, dense or expert, whose gradient buffers contain ``param``; else None."""
    for candidate in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if isinstance(candidate, DistributedOptimizer) and any(param in b.param_index_map for b in candidate.buffers):
            return candidate
    return None


def _detached(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` with sharded tensors that keep their present storage when ``param.data`` is replaced later."""
    for value in state.values():
        if torch.is_tensor(getattr(value, "data", None)):
            value.data = value.data.detach()
    return state
