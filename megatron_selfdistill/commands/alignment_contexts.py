# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The hints that the teacher sees in `selfdistill alignment`: the solution, the answer, or solutions of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import ConfigError

if TYPE_CHECKING:
    from megatron_selfdistill.data.problems import Problem

CONTEXTS = ("solution", "answer")
"""The contexts besides files."""


def check_contexts(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a context that is named twice, or that is neither of `CONTEXTS` nor a file."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f"--teacher-context {name}: expected different contexts, got this one twice")
        if name not in CONTEXTS and not Path(name).is_file():
            raise ConfigError(
                f"--teacher-context {name}: expected {', '.join(CONTEXTS)} or a file that `selfdistill solutions` has "
                "written, got no such file"
            )


def hinted_problems(names: Sequence[str], problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Return the context -> ``problems`` with the hint of the context as the solution.

    A file has one JSON object per line, with ``problem_id`` and ``solution``; the first line of a problem counts.
    Raises: `ConfigError` for a problem without a hint, and for a file of another form.
    """
    found = {}
    for name in names:
        if name == "solution":
            found[name] = list(problems)
        elif name == "answer":
            found[name] = [problem.with_answer_as_solution() for problem in problems]
        else:
            solutions = _solutions_in(Path(name))
            missing = [problem for problem in problems if problem.id not in solutions]
            if missing:
                raise ConfigError(
                    f"--teacher-context {name}: expected a solution for each of the {len(problems)} problems, got none "
                    f"for {missing[0].location} (problem_id {missing[0].id!r}) and {len(missing) - 1} others"
                )
            found[name] = [replace(problem, solution=solutions[problem.id]) for problem in problems]
    return found


def _solutions_in(path: Path) -> dict[str, str]:
    """Return the problem's id -> its first solution in a file.  Raises: `ConfigError`."""
    solutions: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record: Any = from_json(line)
            solutions.setdefault(str(record["problem_id"]), str(record["solution"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--teacher-context {path}:{number}: expected a JSON object with problem_id and solution, as "
                f"`selfdistill solutions` writes it ({type(error).__name__}: {error})"
            ) from None
    return solutions
