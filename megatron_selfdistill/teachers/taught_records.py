# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records of a run with named teachers: who teaches a record, and the wording of each teacher's prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_selfdistill.config import Config, function_named
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptView
from megatron_selfdistill.data.records import quoted
from megatron_selfdistill.errors import BadRecordError, ConfigError
from megatron_selfdistill.teachers.teachers_config import CHOOSE, NamedTeacher, chosen_by, teacher_of_record


class TaughtRecords:
    """The teachers of the records of a run, by the field ``teacher`` of a record or by a function of the user."""

    def __init__(self, teachers: Mapping[str, NamedTeacher], column: str = "teacher", choice: str | None = None):
        """Read a record's teacher from ``column``, or ask the function with the dotted path ``choice``.

        The function takes the record and the names of the teachers, and returns what the column would hold.
        Raises: `ConfigError` if there is no such function.
        """
        self.teachers, self._column, self._choose = teachers, column, None
        self._place = f"field {column!r}"
        if choice is not None:
            self._place = f"teachers.{CHOOSE}={choice}"
            self._choose = function_named(f"teachers.{CHOOSE}", choice, {}, ConfigError)

    @classmethod
    def of(cls, config: Config) -> TaughtRecords:
        """Return the teachers of the key ``teachers``."""
        column = config.data.fields.get("teacher", "teacher")
        return cls(config.named_teachers, column, chosen_by(config.teachers))

    def shares(self, record: Mapping[str, Any], location: str) -> dict[str, float]:
        """Return the share of each teacher of a record by name, in the order of the names; the sum is 1.

        Raises: `BadRecordError` for a column that names no teacher; `ConfigError` with the location where the user's
        function fails or names none.
        """
        if self._choose is None:
            return self._shares(record.get(self._column))
        try:
            return self._shares(self._choose(dict(record), tuple(self.teachers)))
        except BadRecordError as error:
            raise ConfigError(f"{location}: {error}: correct the function") from error
        except ConfigError as error:
            raise ConfigError(f"{location}: {error}") from error

    def read_solution(self, names: Iterable[str]) -> bool:
        """Return whether a teacher among ``names`` reads the solution."""
        return any(self.teachers[name].is_hinted for name in names)

    def templates(
        self, student_template: str, view: Callable[[Mapping[str, Any]], PromptView]
    ) -> dict[str, Mapping[str, Any]]:
        """Return the fields of `PromptTemplates` with the wordings and the forms that single teachers have.

        ``view``: returns the form of a teacher's prompt that has some entries for itself.
        """
        named = self.teachers.items()
        own = {name: one.template for name, one in named if one.template is not None or not one.is_hinted}
        return {
            "of_teachers": {name: template or student_template for name, template in own.items()},
            "views_of_teachers": {name: view(one.view) for name, one in named if one.view},
        }

    def each(self, problem: Problem, pair: PromptPair) -> Iterator[tuple[Problem, PromptPair]]:
        """Yield a problem and its prompts for each of its teachers alone."""
        if not problem.shares:
            yield problem, pair
        for one in pair.of_teachers:
            alone = replace(pair, teacher_prompt=one.prompt, teacher=one.teacher)
            yield replace(problem, teacher=one.teacher, shares=()), alone

    def _shares(self, named: object) -> dict[str, float]:
        """Return `shares` for the name of a teacher, a mapping of names to weights, or None."""
        teachers = self.teachers
        weights: Any = named if isinstance(named, Mapping) else {teacher_of_record(named, teachers): 1}
        weights = {name: weight for name, weight in weights.items() if weight is not None}  # columns of Parquet
        if not weights or not all(name in teachers and _is_weight(weight) for name, weight in weights.items()):
            got = "no teacher, and none of them has the name default" if named is None else quoted(named)
            raise BadRecordError(
                f"{self._place}: expected the name of one of the teachers {', '.join(teachers)}, or a "
                f"mapping of such names to weights above 0, got {got}"
            )
        total = math.fsum(weights.values())
        return {name: float(weights[name] / total) for name in sorted(weights)}


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
