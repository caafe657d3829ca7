# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The operations that would make the host wait for a GPU, recorded on a CPU.

    with host_traffic() as found:
        ...
    assert found == []  # ["tolist at megatron_selfdistill/metrics/step.py:12", ...]

The recorded operations are operators whose value or shape the host must know, and the methods that move a tensor to
another device or to Python.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = "/megatron_selfdistill/"
ELSEWHERE = "/megatron/core/"
EXEMPT = (
    "/megatron_selfdistill/loss/sharded/shard_sums.py",  # the loss in PyTorch; Triton's choose rows on the GPU
    "/megatron/core/tensor_parallel/random.py",  # compares states of the host's random numbers
)

# This file calls torch's factories for Megatron, on a CPU only.
BETWEEN = ("/megatron_selfdistill/compat/cpu.py",)

READ_BY_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
FACTORIES = ("tensor", "as_tensor")
"""Functions that copy pageable memory if they get a device."""
MOVES = ("to", "cpu", "cuda", "new_tensor", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


class _Operators(TorchDispatchMode):
    """The recorder of operators, in the form ``operator at file:line``."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        with_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        of_unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        filled = with_mask and name != "index" and args[2].numel() == 1  # by masked_fill, on the device
        if name in READ_BY_THE_HOST or of_unknown_size or (with_mask and not filled):
            record(name, self.found)
        return func(*args, **(kwargs or {}))


def record(what: str, found: list[str]) -> None:
    """Append ``what`` and the line of this project or of Megatron that calls it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(EXEMPT):
            return
        if (PACKAGE in file or ELSEWHERE in file) and not file.endswith(BETWEEN):
            found.append(f"{what} at {file.rpartition('/site-packages/')[2]}:{frame.f_lineno}")
            return
        frame = frame.f_back


@contextlib.contextmanager
def host_traffic() -> Iterator[list[str]]:
    """Yield the list of the operations that are recorded inside, in the order of the calls."""
    found: list[str] = []

    def moved(move: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            named = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
            to_device = move != "to" or (named and not kwargs.get("non_blocking"))
            file = sys._getframe(1).f_code.co_filename
            ours = PACKAGE in file and not file.endswith(BETWEEN)
            if to_device and (ours or (ELSEWHERE in file and move == "tolist")):
                record(move, found)
            return original(self, *args, **kwargs)

        return call

    def made(factory: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                record(factory, found)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, _Operators(found):
        for move in MOVES:
            patch.setattr(torch.Tensor, move, moved(move, getattr(torch.Tensor, move)))
        for factory in FACTORIES:
            patch.setattr(torch, factory, made(factory, getattr(torch, factory)))
        yield found
