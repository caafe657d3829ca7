# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which weights teach: those at the start of the run, their moving average, or the current ones."""

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

from megatron_selfdistill.model.build import unwrapped

Chunks = list[torch.nn.Module]


class Teacher:
    """The teacher's chunks on this rank, cut like the student's.

    ``frozen`` and ``ema`` hold a copy in the parameters' dtype; ``ema`` holds a float32 master beside it,
    because an average in bf16 never moves (its step is below half a unit in the last place). ``current``
    holds nothing. With ``offload`` the copy rests in pinned host memory and is on the device only within
    `on_device`.
    """

    def __init__(
        self,
        weights: str,
        student: Sequence[torch.nn.Module],
        build_chunks: Callable[[], Chunks],
        *,
        ema_decay: float = 0.99,
        offload: bool = False,
    ) -> None:
        self.weights, self.ema_decay = weights, ema_decay
        self.student = list(student)
        self.offload = offload and weights != "current"
        self.chunks = self.student if weights == "current" else build_chunks()
        self.masters: list[Tensor] = []
        self._resting: list[Tensor] = []
        if weights != "current":
            for chunk in self.chunks:
                chunk.requires_grad_(False)
                chunk.eval()
            self.copy_student()

    def copy_student(self) -> None:
        """Take the student's present weights: at the start of a run, once its checkpoint has been read."""
        if self.weights == "current":
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
        """After an optimizer step, for ``ema``: master = decay * master + (1 - decay) * the optimizer's
        float32 main parameter, then the copy is cast from it. Buffers (expert biases) are copied.

        Collectives: under the distributed optimizer one all-reduce per bf16 parameter over the ranks that
        share it.
        """
        if self.weights != "ema":
            return
        with torch.no_grad(), self.on_device(keep=True):
            for master, (mine, theirs) in zip(self.masters, self._pairs(), strict=True):
                main = main_parameter(theirs, optimizer)
                master.lerp_(main.to(master.device), 1.0 - self.ema_decay)
                mine.copy_(master)
            self._copy_buffers()
        self._weights_changed()

    @contextlib.contextmanager
    def on_device(self, keep: bool = False) -> Iterator[Chunks]:
        """The chunks, ready to run.

        With ``offload`` they leave the device at the end; what was changed is kept only with ``keep``.
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
        """What a checkpoint holds of the teacher: the float32 master for ``ema``, the copy for ``frozen``;
        keys begin with ``teacher.``. Tensors are shared, not copied."""
        if self.weights == "current":
            return {}
        with self.masters_in_place():
            state = {}
            for index, chunk in enumerate(self.chunks):
                state[f"teacher{index}"] = _detached(unwrapped(chunk).sharded_state_dict(prefix="teacher."))
            return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `sharded_state_dict`, from loaded tensors."""
        if self.weights == "current":
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
        """The parameters *are* the float32 masters for the while: Megatron's state dicts describe them."""
        params = [mine for mine, _ in self._pairs()]
        data = [p.data for p in params]
        for param, master in zip(params, self.masters, strict=False):  # no masters unless ema
            param.data = master
        try:
            yield
        finally:
            for param, own in zip(params, data, strict=True):
                param.data = own

    def _weights_changed(self) -> None:
        """Let layers in FP8 quantise their weights anew: they keep a copy from their first forward pass until they are
        told, and a schedule tells the student's only."""
        for chunk in self.chunks:
            unwrapped(chunk).set_is_first_microbatch()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for mine, theirs in zip(self.chunks, self.student, strict=True):
            yield from zip(unwrapped(mine).parameters(), unwrapped(theirs).parameters(), strict=True)

    def _copy_buffers(self) -> None:
        for mine, theirs in zip(self.chunks, self.student, strict=True):
            for a, b in zip(unwrapped(mine).buffers(), unwrapped(theirs).buffers(), strict=True):
                if a.dtype != b.dtype:  # routers turn their bf16 biases into float32 when they first run
                    a.data = a.data.to(b.dtype)
                a.copy_(b)


def main_parameter(param: Tensor, optimizer: MegatronOptimizer) -> Tensor:
    """The whole float32 parameter that the optimizer updates for ``param``, in its shape, on every rank.

    For float32 training that is the parameter. The distributed optimizer keeps slices of a bf16 parameter's
    main copy on some of its data-parallel ranks; all others add zeros, which is exact.
    """
    if param.dtype == torch.float32:
        return param.detach()
    owner = _distributed_optimizer_of(param, optimizer)
    if owner is None:
        return param.main_param.detach().view_as(param)  # type: ignore[attr-defined]
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if param in owner.model_param_gbuf_map:  # this rank holds a slice
        own = owner._get_model_param_range_map(param)["param"]
        whole[own.start : own.end] = param.main_param  # type: ignore[attr-defined]
    dist.all_reduce(whole, group=owner.data_parallel_group)
    return whole.view(param.shape)


def _distributed_optimizer_of(param: Tensor, optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """The distributed optimizer (dense or expert) whose gradient buffers hold ``param``, or None."""
    optimizers = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for candidate in optimizers:
        if isinstance(candidate, DistributedOptimizer) and any(param in b.param_index_map for b in candidate.buffers):
            return candidate
    return None


def _detached(state: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors that keep the storage they have now, whatever ``param.data`` is set to later."""
    for value in state.values():
        if torch.is_tensor(getattr(value, "data", None)):
            value.data = value.data.detach()
    return state
