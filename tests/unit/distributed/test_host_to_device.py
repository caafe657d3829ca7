# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tensors that travel together arrive as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.distributed.host_to_device import to_device


@dataclass(frozen=True)
class Node:
    name: str
    value: Tensor
    more: list[Tensor | None]


def tree() -> dict[str, object]:
    shared = torch.arange(5, dtype=torch.int32)
    return {
        "a": Node("first", torch.randn(3, 7), [shared, None, torch.tensor([True, False, True])]),
        "b": (shared, 7, torch.empty(0, 4, dtype=torch.int64), torch.randn(2, 3).t()),
        "c": torch.tensor(3.5, dtype=torch.float64),
    }


def test_tensors_keep_their_values_shapes_and_dtypes_and_other_values_stay():
    before = tree()
    after = to_device(before, torch.device("cpu"))
    assert after["a"].name == "first" and after["a"].more[1] is None and after["b"][1] == 7

    def tensors(it: dict[str, Any]) -> list[Tensor]:
        return [it["a"].value, it["a"].more[0], it["a"].more[2], *it["b"][2:], it["c"]]

    for old, new in zip(tensors(before), tensors(after), strict=True):
        assert new is not old and new.dtype == old.dtype and torch.equal(new, old)
    assert after["b"][0] is after["a"].more[0], "what was one tensor is one tensor"


def test_a_cuda_device_gets_pinned_copies_without_waiting(monkeypatch):
    """Recorded, since there is no such device here: what is pinned, and how it is sent."""
    pinned, sent = [], []
    to = torch.Tensor.to

    def recorded_to(self, device, *, non_blocking, copy):
        sent.append((self, str(device), non_blocking))
        return to(self, "cpu")

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self + 0) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "to", recorded_to)
    to_device([torch.ones(3), torch.zeros(4)], torch.device("cuda", 1))
    assert sent == [(it, "cuda:1", True) for it in pinned] and len(pinned) == 2
