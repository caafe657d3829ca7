# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the hints of the data decide, and controls: hints of other problems after which the teacher reads a response."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from megatron_selfdistill.config.schema.target_config import planned_controls, shows_solutions
from megatron_selfdistill.config.schema.whole_config import record_teachers
from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.problems import Problem, are_one_hint
from megatron_selfdistill.errors import ConfigError

if TYPE_CHECKING:
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.given_solutions import GivenSolutions


def with_decided_target(config: Config, problems: Sequence[Problem]) -> Config:
    """Return ``config`` with what target.anchor=auto and target.control=auto stand for in a run on these problems."""
    target = config.target
    if target.control == "auto" and not num_controls(config, problems):
        target = replace(target, control="none")
    if target.anchor == "auto":
        counts = shows_solutions(config) and record_teachers(config) is None
        follows = counts and are_one_hint([problem.solution for problem in problems])
        target = replace(target, anchor="student" if follows else "reference")
    return replace(config, target=target)


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
        """Return the contexts of a step with their control prompts; ``about[i].problem``: that of ``contexts[i]``.

        Where several teachers read a context, each of them has the same hints in its own wording.
        """
        problems = {(one.problem.id, one.problem.teacher): one.problem for one in about}
        pairs = {name: self._pairs(step, problem) for name, problem in problems.items()}
        return [
            _with_controls(context, pairs[one.problem.id, one.problem.teacher])
            for context, one in zip(contexts, about, strict=True)
        ]

    def prompts(self, step: int, problem: Problem) -> tuple[list[int], ...]:
        """Return the teacher's prompts of a problem with the hints of ``number`` other problems.

        They depend on (seed, step, problem) alone, so that all samples of a problem share them and a resumed run draws
        them again.  A hint that does not fit is left out, and the prompts differ from each other and from that of the
        problem's own hint as long as there are enough.  Without any, the prompt shows the problem's own hint: the
        response then teaches nothing.
        """
        return tuple(pair.teacher_prompt for pair in self._pairs(step, problem))

    def _pairs(self, step: int, problem: Problem) -> list[PromptPair]:
        own = self.given.pair(problem)
        found: list[PromptPair] = []
        for hint in self._hints(step, problem):
            pair = self.given.pair_with(problem, hint)  # shows a part of a long hint, which may be a part of others
            if pair is not None and pair.teacher_prompt not in [it.teacher_prompt for it in (own, *found)]:
                found.append(pair)
            if len(found) == self.number:
                break
        found = found or [own]
        return [found[k % len(found)] for k in range(self.number)]

    def _hints(self, step: int, problem: Problem) -> Iterator[str]:
        """Yield different hints of other problems in random order, none of which is the problem's own.

        Hints that may be right for this problem too come last: those of problems with the same answer or question.
        """
        rng, may_be_right = random.Random(f"controls {self.seed} {step} {problem.id}"), []
        own, answer = problem.solution.strip(), (problem.answer or "").split()
        seen, num_texts = {own}, len(self._texts) + (own not in self._texts)
        for index in _shuffled(len(self.problems), rng):
            other = self.problems[index]
            text = other.solution.strip()
            if len(seen) == num_texts:
                break
            if text in seen or other.id == problem.id:
                continue
            seen.add(text)
            if other.messages == problem.messages or (answer and (other.answer or "").split() == answer):
                may_be_right.append(other.solution)
            else:
                yield other.solution
        yield from may_be_right

    @functools.cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(problem.solution.strip() for problem in self.problems)


def _with_controls(context: ContextPair, pairs: Sequence[PromptPair]) -> ContextPair:
    of_teachers = tuple(
        one._replace(control_prompts=tuple(pair.of_teachers[place].prompt for pair in pairs))
        for place, one in enumerate(context.of_teachers)
    )
    return replace(context, control_prompts=tuple(pair.teacher_prompt for pair in pairs), of_teachers=of_teachers)


def _shuffled(number: int, rng: random.Random) -> Iterator[int]:
    """Yield 0 .. number - 1 in random order; the time of the first ones does not depend on ``number``."""
    moved: dict[int, int] = {}
    for place in range(number):
        other = rng.randrange(place, number)
        yield moved.get(other, other)
        moved[other] = moved.get(place, place)
