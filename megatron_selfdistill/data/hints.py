# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the teacher's prompt adds to the student's: whether the solution can be read in it, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, Tokenizer, last_user_text

LOOKED_AT = 64
"""Problems whose prompts are checked before a run starts: a chat template treats all alike."""

_SHORT = 9  # characters: less would be found by chance

_ADVICE = "give a data.chat_template that writes the whole content of user messages"


@dataclass(frozen=True)
class HintCost:
    """Tokens by which a teacher's prompt is longer than the student's; means, where it is about several problems."""

    wording: float
    """Of data.teacher_template with an empty solution."""
    solution: float
    """Of the solution in it."""


def hint_cost(builder: PromptBuilder, problem: Problem, student: Sequence[int], teacher: Sequence[int]) -> HintCost:
    """Return what the teacher's prompt costs more than the student's; both are token ids of ``problem``."""
    wording = len(builder.teacher_prompt(problem, ""))
    return HintCost(wording - len(student), len(teacher) - wording)


def mean_cost(costs: Sequence[HintCost]) -> HintCost:
    """Return the means of at least one cost."""
    return HintCost(
        *(sum(values) / len(costs) for values in zip(*((c.wording, c.solution) for c in costs), strict=True))
    )


def check_student_prompt(builder: PromptBuilder, problem: Problem, student: Sequence[int]) -> None:
    """Raise ValueError, without quoting the problem, unless its text can be read in the student's prompt.

    ``student``: token ids.  White space does not count, nor what the tokenizer does not keep of any text.
    """
    if not _shows(builder.tokenizer, student, last_user_text(problem)):
        raise ValueError(
            f"{problem.location}: expected the student's prompt to show the problem, got {len(student)} tokens without "
            f"its text; {_ADVICE}"
        )


def check_teacher_prompt(
    builder: PromptBuilder, problem: Problem, student: Sequence[int], teacher: Sequence[int], solution: str
) -> None:
    """Raise ValueError, without quoting them, unless problem and solution can be read in the teacher's prompt.

    ``solution``: what the prompt is meant to show of it.  ``student``, ``teacher``: token ids.
    """
    problem_text, got = last_user_text(problem), f"got {len(teacher)} tokens without its text"
    if list(teacher) == list(student):
        got = f"got the {len(teacher)} tokens of the student's prompt"
    elif not _shows(builder.tokenizer, teacher, problem_text):
        raise ValueError(f"{problem.location}: expected the teacher's prompt to show the problem, {got}; {_ADVICE}")
    elif solution.strip() and list(teacher) == builder.teacher_prompt(problem, ""):
        # A short solution, such as the letter of a choice, may stand in the problem too.
        got = f"got the same {len(teacher)} tokens with and without one"
    elif _shows(builder.tokenizer, teacher, solution):
        return
    raise ValueError(
        f"{problem.location}: expected the teacher's prompt to show the solution, {got}, which leaves nothing to "
        f"learn; {_ADVICE}, in which data.teacher_template puts the solution"
    )


def _shows(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> bool:
    if not text.strip():
        return True
    # Tokenizers normalise: letter case, Unicode forms, unknown characters.  Both sides have passed through one.
    wanted = _without_space(tokenizer.decode(tokenizer.encode(text)))
    # A normalising tokenizer may join the first and the last character with the text around them.
    core = wanted[1:-1] if len(wanted) > _SHORT else wanted
    return bool(wanted) and core in _without_space(tokenizer.decode(prompt))


def _without_space(text: str) -> str:
    return "".join(text.split())
