# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teachers of the key ``teachers``: one frozen copy of the model, into which each teacher's weights are swapped.

A teacher that is adapters takes no copy: its factors add to the outputs of the frozen start's layers.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.adapters import WithOtherAdapters
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.teacher import Chunks


def require_host_memory(names: Sequence[str], chunks: Sequence[torch.nn.Module]) -> None:
    """Raise `ConfigError` on all ranks where a node has no room for the full weights of the teachers ``names``.

    ``chunks``: the model on this rank, to whose size each teacher adds in pinned host memory.
    Collectives: one all_gather_object over the world.
    """
    tensors = [it for chunk in chunks for it in (*unwrapped(chunk).parameters(), *unwrapped(chunk).buffers())]
    own = len(names) * sum(it.nbytes for it in tensors)
    ranks = gather_objects((socket.gethostname(), own, psutil.virtual_memory().available))
    for node, _, available in ranks:
        needed = sum(size for place, size, _ in ranks if place == node)
        if needed > available:
            raise ConfigError(
                f"the weights of {len(names)} teachers (teachers.{'.load, teachers.'.join(names)}.load) take "
                f"{needed / 2**30:.3g} GiB of host memory on {node}, which has {available / 2**30:.3g} GiB left: name "
                "fewer teachers, give adapters in place of full weights, or run on more nodes"
            )


class AdapterTeacher:
    """A teacher that is low-rank adapters on the frozen start of the run, of which it keeps the factors alone.

    With ``rests`` the factors are in pinned host memory, and on the device only within `on_device`.
    """

    def __init__(self, chunks: Sequence[WithOtherAdapters], *, device: torch.device, rests: bool) -> None:
        """Take over ``chunks``, whose factors are loaded."""
        self.chunks: Chunks = [*chunks]
        self._device = device
        self._factors = [factor for chunk in chunks for factor in chunk.factors]
        self._resting = [_in_host_memory(factor) for factor in self._factors] if rests else []  # all, or none
        self._rest()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Chunks]:
        """Yield the chunks with the factors on the device, where the caller has the start's weights."""
        for factor, host in zip(self._factors, self._resting, strict=False):
            factor.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield self.chunks
        finally:
            self._rest()

    def _rest(self) -> None:
        for factor, host in zip(self._factors, self._resting, strict=False):
            factor.data = host


class NamedTeachers:
    """The weights of the teachers that have a directory, on this rank, cut like the student's chunks.

    One copy of the model holds the full weights of one teacher at a time.  With several such teachers, or with
    ``offload``, the weights of all rest in pinned host memory.  With ``offload`` the copy is on the device only within
    `on_device`.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        build_chunks: Callable[[], Chunks],
        load: Callable[[Path, Chunks], None],
        *,
        offload: bool = False,
        adapted: Mapping[str, AdapterTeacher] | None = None,
    ) -> None:
        """Load all teachers in the order of their names; ``load``: fills chunks with the weights of a directory.

        ``directories``: those with full weights; without any there is no copy.  ``adapted``: the other teachers.
        Collectives: those of ``load``, once per teacher.
        """
        self.chunks, self.offload = build_chunks() if directories else [], offload
        self._adapted = dict(adapted or {})
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._resting: dict[str, list[Tensor]] = {}
        for name in sorted(directories):
            load(directories[name], self.chunks)
            self.present = name
            """The teacher whose weights the copy has."""
            if offload or len(directories) > 1:
                self._resting[name] = [_in_host_memory(tensor) for tensor in self._tensors()]
        if offload and directories:
            self._rest()

    @contextlib.contextmanager
    def on_device(self, name: str) -> Iterator[Chunks]:
        """Yield the chunks on the device with the weights of the teacher ``name``.

        The start of the run is on the device already where the teacher is adapters on it.
        """
        if name in self._adapted:
            with self._adapted[name].on_device() as chunks:
                yield chunks
            return
        if name != self.present or self.offload:
            with torch.no_grad():
                self._swap_in(name)
        try:
            yield self.chunks
        finally:
            if self.offload:
                self._rest()

    def _swap_in(self, name: str) -> None:
        """Copy the resting weights of a teacher to the device, asynchronously from pinned memory."""
        for tensor, host in zip(self._tensors(), self._resting[name], strict=True):
            if self.offload:
                tensor.data = host.to(torch.cuda.current_device(), non_blocking=True, copy=True)
            else:
                tensor.copy_(host, non_blocking=True)
        self.present = name
        for chunk in self.chunks:
            unwrapped(chunk).set_is_first_microbatch()  # FP8 layers quantise their weights again

    def _rest(self) -> None:
        """Free the memory of the copy on the device: its tensors become the resting ones."""
        for tensor, host in zip(self._tensors(), self._resting[self.present], strict=True):
            tensor.data = host

    def _tensors(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            yield from unwrapped(chunk).parameters()
            yield from unwrapped(chunk).buffers()


def _in_host_memory(tensor: Tensor) -> Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor.detach())
