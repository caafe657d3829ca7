# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which problems need guidance: those that the student, writing alone, has rarely solved of late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WINDOW = 4
"""Visits to a problem, written alone, over which its success rate is the mean."""
PROBE_EVERY = 4
"""Of so many visits to a guided problem the last is written alone, so that its rate stays known."""

Visit = tuple[str, bool, float]
"""Problem id, whether it was guided, share of right responses."""


@dataclass
class _Visits:
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    guided_since: int = 0
    """Guided visits since the last one written alone."""


class SuccessRates:
    """Per problem, the share of right responses in its last visits that were written alone.

    Equal on every rank of the world if every rank records the same verdicts in the same order.  Guided responses count
    for nothing here: that the mix solves a problem does not say that the student does.
    """

    def __init__(self, guide_below: float) -> None:
        """``guide_below``: in (0, 1]; a problem whose rate lies below it is guided."""
        self._guide_below = guide_below
        self._visits: dict[str, _Visits] = {}

    def guides(self, problem_id: str) -> bool:
        """Whether the next visit is guided.  The first is not, and of those to a guided problem every
        PROBE_EVERY-th is not."""
        visits = self._visits.get(problem_id)
        if visits is None or not visits.alone:
            return False
        rate = sum(visits.alone) / len(visits.alone)
        return rate < self._guide_below and visits.guided_since < PROBE_EVERY - 1

    def record(self, visits: Iterable[Visit]) -> None:
        """All visits of a step."""
        for problem_id, guided, share in visits:
            known = self._visits.setdefault(problem_id, _Visits())
            if guided:
                known.guided_since += 1
            else:
                known.alone.append(share)
                known.guided_since = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {problem_id: (list(v.alone), v.guided_since) for problem_id, v in self._visits.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._visits = {
            problem_id: _Visits(deque(alone, maxlen=WINDOW), guided_since)
            for problem_id, (alone, guided_since) in state.items()
        }
