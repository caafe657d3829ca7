# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The memory that tensors take, on any device and without a profiler."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class BytesAlive(TorchDispatchMode):
    """The bytes of the tensors that Python holds, without those of ``known``, and the largest count, ``peak``."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.tensors: dict[tuple[int, int], weakref.ref[Tensor]] = {}  # by storage and identity
        self.holders: Counter[int] = Counter()  # tensors of each storage
        self.bytes_of: dict[int, int] = {}
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        self.peak = max(self.peak, self.alive)
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until the last tensor that holds the storage ends."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        key = (place, id(tensor))
        if place in self.known or key in self.tensors:
            return

        def release(_: weakref.ref[Tensor]) -> None:
            del self.tensors[key]
            self.holders[place] -= 1
            if not self.holders[place]:
                self.alive -= self.bytes_of.pop(place)

        self.tensors[key] = weakref.ref(tensor, release)
        self.holders[place] += 1
        if place not in self.bytes_of:
            self.bytes_of[place] = storage.nbytes()
            self.alive += self.bytes_of[place]
