# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teachers of the key ``teachers``: a frozen copy of a model, into which the weights of its teachers are swapped.

There is one copy for each architecture.  A teacher that is adapters takes no copy: its factors add to the outputs of
the frozen start's layers.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_selfdistill.adapters.low_rank_adapters import WithOtherAdapters
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Chunks


def require_host_memory(resting: Mapping[str, Sequence[torch.nn.Module]]) -> None:
    """Raise `ConfigError` on all ranks where a node has no room for the full weights of teachers in host memory.

    ``resting``: the name of each such teacher -> the model on this rank, whose size its weights take.  The model may be
    on the meta device.  Collectives: one all_gather_object over the world, if there is such a teacher.
    """
    if not resting:
        return
    tensors = [it for chunks in resting.values() for it in _tensors(chunks)]
    names, own = sorted(resting), sum(1 << (it.nbytes - 1).bit_length() for it in tensors)  # as PyTorch pins memory
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
    """The full weights of the teachers of one architecture, on this rank, in the layout of the student.

    One copy of the model holds the weights of one teacher at a time.  With several teachers, or with ``offload``, the
    weights of all rest in pinned host memory.  With ``offload`` the copy is on the device only within `on_device`.
    Without, `fetch` hides the copying of the next teacher's layers behind the student's passes.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        build_chunks: Callable[[], Chunks],
        load: Callable[[Path, Chunks], None],
        *,
        offload: bool = False,
    ) -> None:
        """Load all teachers in the order of their names; ``load``: fills chunks with the weights of a directory.

        ``directories``: those of one teacher or more.  Collectives: those of ``load``, once per teacher.
        """
        self.chunks, self.offload = build_chunks(), offload
        self._fetched, self._stream = "", torch.cuda.Stream()
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._resting: dict[str, list[Tensor]] = {}
        for name in sorted(directories):
            load(directories[name], self.chunks)
            self.present = name
            """The teacher whose weights the copy has."""
            if offload or len(directories) > 1:
                self._resting[name] = [_in_host_memory(tensor) for tensor in _tensors(self.chunks)]
        if offload:
            self._rest()

    @contextlib.contextmanager
    def on_device(self, name: str) -> Iterator[Chunks]:
        """Yield the chunks on the device with the weights of the teacher ``name``."""
        if name != self.present or self._fetched or self.offload:
            self._swap_in(name)
        try:
            yield self.chunks
        finally:
            if self.offload:
                self._rest()

    @torch.no_grad()
    def fetch(self, name: str) -> None:
        """Begin to copy the layers of the teacher ``name`` to the device, on a stream of their own.

        The caller has made the last forward pass of the present teacher within `on_device`, and may still project its
        states: embedding and output layer are copied only by the `on_device` of ``name``, which waits for the layers.
        The layers are no longer those of the present teacher; any `on_device` gives every tensor of its own teacher.
        Nothing happens where ``name`` has its layers on the device already, is no teacher of this copy, or rests with
        ``offload``.
        """
        if self.offload or name not in self._resting or name == (self._fetched or self.present):
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor, host in zip(_layers(self.chunks), self._resting[name], strict=False):
                tensor.copy_(host, non_blocking=True)
        self._fetched = name

    @torch.no_grad()
    def _swap_in(self, name: str) -> None:
        """Copy the resting weights of a teacher to the device, asynchronously from pinned memory."""
        has_layers, self._fetched = self._fetched == name, ""
        torch.cuda.current_stream().wait_stream(self._stream)
        num_layers = sum(1 for _ in _layers(self.chunks)) if has_layers else 0
        for tensor, host in islice(zip(_tensors(self.chunks), self._resting[name], strict=True), num_layers, None):
            if self.offload:
                tensor.data = host.to(torch.cuda.current_device(), non_blocking=True, copy=True)
            else:
                tensor.copy_(host, non_blocking=True)
        self.present = name
        for chunk in self.chunks:
            unwrapped(chunk).set_is_first_microbatch()  # FP8 layers quantise their weights again

    def _rest(self) -> None:
        """Free the memory of the copy on the device: its tensors become the resting ones."""
        for tensor, host in zip(_tensors(self.chunks), self._resting[self.present], strict=True):
            tensor.data = host


def _layers(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """Yield the tensors of the transformer layers: all that a forward pass alone reads."""
    for chunk in chunks:
        yield from (tensor for name, tensor in _named_tensors(chunk) if name.startswith("decoder."))


def _tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    yield from _layers(chunks)
    for chunk in chunks:
        yield from (tensor for name, tensor in _named_tensors(chunk) if not name.startswith("decoder."))


def _named_tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from unwrapped(chunk).named_parameters()
    yield from unwrapped(chunk).named_buffers()


def _in_host_memory(tensor: Tensor) -> Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor.detach())
