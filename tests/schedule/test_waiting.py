# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Between its first and its last microbatch, a step neither reads from the device nor sends to it.

There is no GPU here, so what would wait for one is recorded where it is called: operators whose outcome or shape the
host must know, and the methods of a tensor that bring it to another device.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import layouts
import pytest
import torch
from layouts import Case
from models import parallel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_selfdistill import device_batch, schedule
from megatron_selfdistill.config import ScheduleConfig
from megatron_selfdistill.model import packed_sequences
from megatron_selfdistill.model.output_layer import Fusion

PACKAGE = "/megatron_selfdistill/"
ELSEWHERE = "/megatron/core/"
EXEMPT = (
    "/megatron_selfdistill/loss/row_sums.py",  # the loss in PyTorch; Triton kernels choose these rows on the device
    "/megatron/core/tensor_parallel/random.py",  # compares states of the host's random numbers
)

# Stands between Megatron and torch's factories, on a CPU only.
BETWEEN = ("/megatron_selfdistill/cpu.py",)

READ_BY_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
FACTORIES = ("tensor", "as_tensor")
"""With a device: a copy of pageable memory."""
MOVES = ("to", "cpu", "cuda", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")


class _HostDeviceTraffic(TorchDispatchMode):
    """Records, as ``operator at file:line``, what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        with_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        filled = with_mask and name != "index" and args[2].numel() == 1  # by masked_fill, on the device
        if name in READ_BY_THE_HOST or (with_mask and not filled):
            self.record(name)
        return func(*args, **(kwargs or {}))

    def record(self, what: str) -> None:
        """Record ``what`` where this project or Megatron calls it."""
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.endswith(EXEMPT):
                return
            if frame.filename.endswith(BETWEEN):
                continue
            if PACKAGE in frame.filename or ELSEWHERE in frame.filename:
                self.found.append(f"{what} at {frame.filename.rpartition('/site-packages/')[2]}:{frame.lineno}")
                return


def traffic_of(case: Case) -> list[str]:
    """What one rank's call of the schedule records in ``case``, and how often the batch was copied."""
    traffic, copies = _HostDeviceTraffic(), []
    get = schedule.get_forward_backward_func

    def recorded(move: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            named = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
            to_device = move != "to" or (named and not kwargs.get("non_blocking"))
            frame = traceback.extract_stack(limit=2)[0].filename
            ours = PACKAGE in frame and not frame.endswith(BETWEEN)
            if to_device and (ours or (ELSEWHERE in frame and move in ("tolist", "numpy"))):
                traffic.record(move)
            return original(self, *args, **kwargs)

        return call

    def made(factory: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                traffic.record(factory)
            return original(*args, **kwargs)

        return call

    def watched() -> Callable[..., Any]:
        run = get()

        def call(**kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch, traffic:
                for move in MOVES:
                    patch.setattr(torch.Tensor, move, recorded(move, getattr(torch.Tensor, move)))
                for factory in FACTORIES:
                    patch.setattr(torch, factory, made(factory, getattr(torch, factory)))
                return run(**kwargs)

        return call

    layouts.run(case)  # what is made once and kept is there now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "get_forward_backward_func", watched)
        copy = device_batch.to_device_in_one_copy
        patch.setattr(device_batch, "to_device_in_one_copy", lambda *a: copies.append(1) or copy(*a))
        layouts.run(case)
    return [*sorted(set(traffic.found)), f"{len(copies)} copies"]


CASES = {
    "plain": (Case(), 1),
    "alternating": (Case(pair_order="alternating", paired=True), 1),
    "fused": (Case(fusion=Fusion("keep_gradient", 16)), 1),
    "full recompute": (
        Case(schedule=ScheduleConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
        1,
    ),
    "TP2 with sequence parallelism": (Case(parallel=parallel(tp=2, sp=True)), 2),
    "TP2 with sequence parallelism, fused": (
        Case(parallel=parallel(tp=2, sp=True), fusion=Fusion("low_memory", 16)),
        2,
    ),
    "PP2": (Case(parallel=parallel(pp=2)), 2),
    "tied": (Case(kind="tied"), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_of_all_microbatches_exchange_nothing_with_the_host(ranks, name):
    case, world_size = CASES[name]
    for found in ranks.run(traffic_of, case, world_size=world_size):
        pass
        assert found == ["1 copies"]


def traffic_with(fault: str) -> list[str]:
    """What is recorded where one thing is as it was before."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "Megatron's rotary embedding":
            megatrons = packed_sequences._megatrons_rotary_embedding
            patch.setattr(packed_sequences.rope_utils, "_apply_rotary_pos_emb_thd", megatrons)
        elif fault == "attention asks for lengths":
            of = packed_sequences.PackedSequences.of.__func__

            def without_bounds(cls: Any, *args: Any, with_segment_batches: bool) -> Any:
                return dataclasses.replace(of(cls, *args, with_segment_batches=False), segment_bounds=())

            patch.setattr(packed_sequences.PackedSequences, "of", classmethod(without_bounds))
        return traffic_of(Case())


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("Megatron's rotary embedding", "rope_utils.py"),
        ("attention asks for lengths", "layers.py"),
    ],
)
def test_what_a_layer_asks_the_device_would_be_seen(ranks, fault, where):
    (found,) = ranks.run(traffic_with, fault, world_size=1)
    assert any(where in line for line in found), found
