# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A phase of a step that has not ended, as text."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_selfdistill.distributed import signs_of_life


@dataclass(frozen=True)
class PhaseUnderWay:
    """A phase that has been entered and not left."""

    name: str
    began: float
    """The clock (`time.monotonic`) when the phase was entered."""
    finished: int = 0
    """The finished responses of the last call of a sampler."""
    total: int = 0
    """All responses of this call; 0 without a call."""
    whose: str = ""

    @property
    def text(self) -> str:
        """The phase, such as ``evaluation, 12 of 64 responses, 2:10`` or ``train, microbatch 3 of 8, 1:03``."""
        microbatch, of = signs_of_life.microbatch()
        count = f"microbatch {microbatch} of {of}" if of else ""
        count = f"{self.finished} of {self.total} responses {self.whose}".rstrip() if self.total else count
        return ", ".join(filter(None, [self.name, count, duration(time.monotonic() - self.began)]))


def duration(seconds: float) -> str:
    """Return a duration in minutes and seconds, with hours where there are any: ``5:15``, ``2:05:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
