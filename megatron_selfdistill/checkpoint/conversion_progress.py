# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report the progress of a conversion, and check its tensors on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_selfdistill.checkpoint.formats.finite import is_finite
from megatron_selfdistill.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """The functions that receive the progress of a conversion."""

    start: Callable[[int], None] = lambda _: None
    """Receives the total number of bytes, once."""
    advance: Callable[[int], None] = lambda _: None
    """Receives the number of bytes of each written tensor."""
    report: Callable[[str], None] = lambda _: None
    """Receives a message for each decision of the conversion."""


class FiniteCheck:
    """The check of each converted tensor for NaN and infinities; ``source`` names the checkpoint in messages.

    ``allow``: whether --allow-non-finite was given; None for commands without this option.
    """

    def __init__(self, source: str, allow: bool | None, progress: Progress) -> None:
        self._source, self._allow, self._progress = source, allow, progress

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``; raise CheckpointError where ``tensor`` is not finite, unless that is allowed."""
        if not is_finite(tensor):
            message = f"{name} of {self._source} has NaN or infinite elements (as {tensor.dtype})"
            if not self._allow:
                option = "" if self._allow is None else ", or convert it with --allow-non-finite"
                raise CheckpointError(f"{message}: take an earlier checkpoint{option}")
            self._progress.report(message)
        return tensor
