# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guidance: which problems get responses sampled from the target.

Under ``rollout.guide_below`` guidance goes to the problems that the student alone has rarely solved of late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.rollouts import Rollout

WINDOW = 4
"""The number of visits to a problem without guidance over which the success rate is the mean."""
PROBE_EVERY = 4
"""The period of visits to a guided problem without guidance, which keep the success rate of the problem known."""

Visit = tuple[str, bool, float]
"""The problem id, whether the responses were guided, and the share of right responses."""


@dataclass(frozen=True)
class _Visits:
    alone: tuple[float, ...] = ()
    """Shares of right responses in the last `WINDOW` visits without guidance."""
    guided_since: int = 0
    """Guided visits since the last visit without guidance."""


@dataclass(frozen=True)
class SuccessRates:
    """The share of right responses in the last visits without guidance, per problem.

    The object is a value, equal on every rank of the world if every rank records the same verdicts in the same order.
    Guided responses do not count, because the student alone may fail at a problem that the mix solves.
    """

    guide_below: float
    """The success rate, in (0, 1], below which a problem is guided."""
    visits: Mapping[str, _Visits] = field(default_factory=dict)
    """The problem id -> the visits to the problem so far."""

    def guides(self, problem_id: str) -> bool:
        """Return whether the next visit samples with guidance: PROBE_EVERY - 1 of PROBE_EVERY to a guided problem.

        A problem is guided if its success rate is known and below ``guide_below``.
        """
        visits = self.visits.get(problem_id, _Visits())
        is_guided = bool(visits.alone) and sum(visits.alone) / len(visits.alone) < self.guide_below
        return is_guided and visits.guided_since < PROBE_EVERY - 1

    def recorded(self, visits: Iterable[Visit]) -> SuccessRates:
        """Return the rates after all visits of a step."""
        table = dict(self.visits)
        for problem_id, guided, share in visits:
            known = table.get(problem_id, _Visits())
            if guided:
                table[problem_id] = _Visits(known.alone, known.guided_since + 1)
            else:
                table[problem_id] = _Visits((*known.alone, share)[-WINDOW:])
        return replace(self, visits=table)

    def state_dict(self) -> dict[str, Any]:
        """Return the visits as plain values for a checkpoint."""
        return {problem_id: (list(v.alone), v.guided_since) for problem_id, v in self.visits.items()}

    def restored(self, state: Mapping[str, Any]) -> SuccessRates:
        """Return these rates with the visits of ``state``, which `state_dict` returned."""
        visits = {problem_id: _Visits(tuple(alone)[-WINDOW:], since) for problem_id, (alone, since) in state.items()}
        return replace(self, visits=visits)


@dataclass(frozen=True)
class Guidance:
    """The choice of the problems whose responses are guided: all that have a solution, or those that fail.

    With the key ``teachers`` these are problems that one teacher alone teaches, which guides them.
    """

    judge: Judge
    num_samples: int
    """The number of responses per visit to a problem."""
    success: SuccessRates | None = None
    """The rates that decide which problems are guided; None guides all problems that have a solution."""
    guide: str = ""
    """The name of the teacher that guides; see `Problem.teacher`."""

    def guides(self, problem: Problem, method: Method) -> bool:
        """Return whether the next responses to ``problem`` are sampled with guidance."""
        if not method.has_solution(problem) or problem.teacher != self.guide or problem.shares:
            return False
        return self.success is None or self.success.guides(problem.id)

    def record(self, rollouts: Sequence[Rollout]) -> Guidance:
        """Return the guidance with the success rates after this step.

        The ``rollouts`` of one visit follow each other.
        Collectives: `Judge.right` and one all_gather_object over the data-parallel ranks; none where all problems are
        guided.
        """
        if self.success is None:
            return self
        right = self.judge.right(rollouts)
        guided = {one.problem.id for one in rollouts if one.response.teacher_log_probs is not None}
        n = self.num_samples
        mine = [
            (rollouts[i].problem.id, rollouts[i].problem.id in guided, sum(right[i : i + n]) / n)
            for i in range(0, len(rollouts), n)
        ]
        return replace(self, success=self.success.recorded(gather_items(mine, self.judge.grid.dp_group)))

    def state_dict(self) -> dict[str, Any] | None:
        """Return the success rates as plain values; None if all problems are guided."""
        return self.success.state_dict() if self.success is not None else None

    def restored(self, state: Mapping[str, Any]) -> Guidance:
        """Return this guidance with the success rates of ``state``, which `state_dict` returned."""
        return self if self.success is None else replace(self, success=self.success.restored(state))
