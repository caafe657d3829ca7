# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The memory that tensors take, on any device and without a profiler."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class BytesAlive(TorchDispatchMode):
    """The bytes of the tensors that Python holds, counted after every operation, without the tensors of ``known``.

    ``peak`` is the largest count so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.holders: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        held = {ptr: (n, refs) for ptr, (n, refs) in self.holders.items() if any(ref() is not None for ref in refs)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    held.setdefault(storage.data_ptr(), (storage.nbytes(), []))[1].append(weakref.ref(tensor))
        self.holders = held
        self.peak = max(self.peak, sum(n for n, _ in held.values()))
        return result
