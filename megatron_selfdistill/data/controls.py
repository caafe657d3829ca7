# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the hints of the data decide, and controls: hints of other problems after which the teacher reads a response."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from megatron_selfdistill.config.schema.target_config import planned_controls, shows_solutions
from megatron_selfdistill.config.schema.whole_config import record_teachers
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem, are_one_hint
from megatron_selfdistill.errors import ConfigError

if TYPE_CHECKING:
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.given_solutions import GivenSolutions


def with_decided_anchor(config: Config, problems: Sequence[Problem]) -> Config:
    """Return ``config`` with the anchor that target.anchor=auto stands for in a run on these problems."""
    if config.target.anchor != "auto":
        return config
    counts = shows_solutions(config) and record_teachers(config) is None
    follows = counts and are_one_hint([problem.solution for problem in problems])
    return replace(config, target=replace(config.target, anchor="student" if follows else "reference"))


class AboutProblem(Protocol):
    """Something about a problem, such as a response to it."""

    @property
    def problem(self) -> Problem:
        """The problem."""


def num_controls(config: Config, problems: Sequence[Problem]) -> int:
    """Return the number of controls of each response in a run on these problems; 0 for a target without controls.

    Raises: `ConfigError` for target.control=other where all hints are one text.
    """
    planned = planned_controls(config)
    if not planned or len({problem.solution for problem in problems}) > 1:
        return planned
    if config.target.control == "other":
        raise ConfigError(
            f"target.control=other needs hints that differ, but all {len(problems)} solutions are one text, which says "
            "nothing about a single problem: set target.control=auto or none"
        )
    return 0


@dataclass(frozen=True)
class Controls:
    """The hints of other problems of the data as controls of the responses of a step."""

    problems: Sequence[Problem]
    """The problems of the data, whose solutions are the hints."""
    given: GivenSolutions
    """The prompts that show the teacher a solution."""
    number: int
    """The number of controls of a response."""
    seed: int
    """The seed of the run."""

    def added(self, step: int, contexts: Sequence[ContextPair], about: Sequence[AboutProblem]) -> list[ContextPair]:
        """Return the contexts of a step with their control prompts; ``about[i].problem``: that of ``contexts[i]``."""
        problems = {(one.problem.id, one.problem.teacher): one.problem for one in about}
        prompts = {name: self.prompts(step, problem) for name, problem in problems.items()}
        return [
            replace(context, control_prompts=prompts[one.problem.id, one.problem.teacher])
            for context, one in zip(contexts, about, strict=True)
        ]

    def prompts(self, step: int, problem: Problem) -> tuple[list[int], ...]:
        """Return the teacher's prompts of a problem with the hints of ``number`` other problems.

        They depend on (seed, step, problem) alone, so that all samples of a problem share them and a resumed run draws
        them again.  A hint that does not fit is left out, and the hints differ from each other as long as there are
        enough.  Where no other hint fits, the prompt shows the problem's own hint: the response then teaches nothing.
        """
        found: list[list[int]] = []
        for hint in self._hints(step, problem):
            pair = self.given.pair_with(problem, hint)
            if pair is not None:
                found.append(pair.teacher_prompt)
            if len(found) == self.number:
                break
        if not found:
            found = [self.given.pair(problem).teacher_prompt]
        return tuple(found[k % len(found)] for k in range(self.number))

    def _hints(self, step: int, problem: Problem) -> Iterator[str]:
        """Yield different hints of other problems in random order, none of which equals the problem's own.

        Hints of problems with the same answer, which may be right for this problem too, come last.
        """
        rng, seen, of_same_answer = random.Random(f"controls {self.seed} {step} {problem.id}"), {problem.solution}, []
        for index in _shuffled(len(self.problems), rng):
            other = self.problems[index]
            if other.solution in seen:
                continue
            seen.add(other.solution)
            if problem.answer is not None and other.answer == problem.answer:
                of_same_answer.append(other.solution)
            else:
                yield other.solution
        yield from of_same_answer


def _shuffled(number: int, rng: random.Random) -> Iterator[int]:
    """Yield 0 .. number - 1 in random order; the time of the first ones does not depend on ``number``."""
    moved: dict[int, int] = {}
    for place in range(number):
        other = rng.randrange(place, number)
        yield moved.get(other, other)
        moved[other] = moved.get(place, place)
