# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The definition of a response that ends in a loop, token by token and with its numbers written out."""

from __future__ import annotations

from collections.abc import Sequence


def loops(tokens: Sequence[int]) -> bool:
    """Return whether ``tokens``, or all but the last of them, end in a loop."""
    return any(
        len(part) >= size and all(part[-i] == part[-i - period] for i in range(1, size - period + 1))
        for part in (list(tokens), list(tokens[:-1]))
        for period in range(1, 65)
        for size in [max(3 * period, 24)]
    )
