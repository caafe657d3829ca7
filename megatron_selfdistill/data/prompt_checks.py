# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first prompts show of problems and hints, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, last_user_text
from megatron_selfdistill.data.tokenizer import Tokenizer

LOOKED_AT = 64
"""Number of problems whose prompts are checked before a run starts; a chat template treats all problems alike."""
UNREADABLE = 1 / 3
"""The share of unknown tokens in the prompts of students above which a run does not start."""
_SHORT = 9  # characters; shorter texts would be found by chance
_ADVICE = "give a data.chat_template that writes the whole content of user messages"


@dataclass(frozen=True)
class HintCost:
    """The tokens by which the teacher's prompt is longer than the student's: of one problem, or means over several."""

    wording: float
    """Tokens of data.teacher_template with an empty solution."""
    solution: float
    """Tokens of the solution in data.teacher_template."""


def hint_cost(builder: PromptBuilder, problem: Problem, student: Sequence[int], teacher: Sequence[int]) -> HintCost:
    """Return the tokens that the teacher's prompt of ``problem`` has more than the student's; both are token ids."""
    wording = len(builder.teacher_prompt(problem, ""))
    return HintCost(wording - len(student), len(teacher) - wording)


def mean_cost(costs: Sequence[HintCost]) -> HintCost:
    """Return the means of one or more costs."""
    return HintCost(fmean(cost.wording for cost in costs), fmean(cost.solution for cost in costs))


def check_student_prompt(builder: PromptBuilder, problem: Problem, student: Sequence[int]) -> None:
    """Raise ValueError, without quoting the problem, unless its text can be read in the student's prompt.

    Tools that the chat template gets must change the prompt.  ``student`` are the token ids of the prompt.  White space
    does not count, nor any character that the tokenizer drops from all texts.
    """
    if not _shows(builder.tokenizer, student, last_user_text(problem)):
        raise ValueError(
            f"{problem.location}: expected the student's prompt to show the problem, got {len(student)} tokens without "
            f"its text; {_ADVICE}"
        )
    if builder.templates.student_view.chat_template_kwargs.get("tools") and _without_tools(builder, problem) == student:
        raise ValueError(
            f"{problem.location}: expected the student's prompt to show the tools, got the same {len(student)} tokens "
            "with and without them: give a data.chat_template that shows tools"
        )


def _without_tools(builder: PromptBuilder, problem: Problem) -> list[int]:
    """Return the student's prompt of the same template without tools; empty if the template needs tools."""
    view = builder.templates.student_view
    kwargs = {name: value for name, value in view.chat_template_kwargs.items() if name != "tools"}
    templates = replace(builder.templates, student_view=replace(view, chat_template_kwargs=kwargs))
    try:
        return PromptBuilder(builder.tokenizer, templates).student_prompt(problem)
    except ValueError:
        return []


def check_teacher_prompt(
    builder: PromptBuilder, problem: Problem, student: Sequence[int], teacher: Sequence[int], solution: str
) -> None:
    """Raise ValueError, which quotes no text, unless problem and solution can be read in the teacher's prompt.

    ``solution`` is the part of the solution that the prompt should show; ``student`` and ``teacher`` are token ids.
    The prompt of a teacher whose wording has no solution shows the problem alone.
    """
    problem_text, got = last_user_text(problem), f"got {len(teacher)} tokens without its text"
    if not builder.shows_solution(problem) and _shows(builder.tokenizer, teacher, problem_text):
        return
    if list(teacher) == list(student):
        got = f"got the {len(teacher)} tokens of the student's prompt"
    elif not _shows(builder.tokenizer, teacher, problem_text):
        raise ValueError(f"{problem.location}: expected the teacher's prompt to show the problem, {got}; {_ADVICE}")
    elif solution.strip() and list(teacher) == builder.teacher_prompt(problem, ""):
        # A short solution, such as the letter of a choice, can be found in the problem, too.
        got = f"got the same {len(teacher)} tokens with and without a solution"
    elif _shows(builder.tokenizer, teacher, solution):
        return
    raise ValueError(
        f"{problem.location}: expected the teacher's prompt to show the solution, {got}, which leaves nothing to "
        f"learn; {_ADVICE}, in which data.teacher_template puts the solution"
    )


def about_unknown_tokens(
    tokenizer: Tokenizer, students: Sequence[Sequence[int]], teachers: Sequence[Sequence[int]] = ()
) -> str | None:
    """Return a warning about the unknown tokens in the prompts of students and teachers; None if there are none.

    Raises: ValueError if their share in the students' prompts is above `UNREADABLE`.
    """
    of_students = _about_unknown(tokenizer, students)
    if of_students is not None and of_students[0] > UNREADABLE:
        raise ValueError(
            f"{of_students[1]}: set data.tokenizer to a tokenizer of the language of the data, that of the model"
        )
    of_all = _about_unknown(tokenizer, [*students, *teachers])
    return None if of_all is None else f"warning: {of_all[1]}"


def _about_unknown(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> tuple[float, str] | None:
    """Return the share of unknown tokens in ``prompts``, and a sentence about it; None if there are none."""
    token = tokenizer.unknown_id
    unknown = 0 if token is None else sum(list(ids).count(token) for ids in prompts)
    if token is None or not unknown:
        return None
    share = unknown / sum(map(len, prompts))
    return share, (
        f"{share:.1%} of the tokens of the first prompts are {tokenizer.decode([token])!r}, the unknown token of "
        f"{tokenizer.name}, which the model reads in place of every text that this tokenizer does not know"
    )


def about_prefix(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> str | None:
    """Return a warning if the tokenizer begins every text with tokens (BOS) that a prompt lacks; None otherwise."""
    prefix = list(tokenizer.prefix)
    if all(list(prompt[: len(prefix)]) == prefix for prompt in prompts):
        return None
    return (
        f"warning: {tokenizer.name} begins a text with {tokenizer.decode(prefix)!r}, and the prompts do not, so that "
        "the model reads what it has seldom seen: let data.chat_template begin with {{ bos_token }}, or with this text"
    )


def about_date(builder: PromptBuilder) -> str | None:
    """Return a warning if the chat template writes the day of the launch; None otherwise."""
    template = str(builder.tokenizer.chat_template or "")
    view = builder.templates.student_view
    if "strftime_now" not in template or ("date_string" in template and "date_string" in view.chat_template_kwargs):
        return None
    return f"warning: the chat template can write the date of the day, so that prompts change overnight: {FIXED_DATE}"


FIXED_DATE = (
    "fix the date: set data.chat_template_kwargs={date_string: 1 January 2026} if the template reads date_string "
    "(Llama 3), else a data.chat_template that has the date written out"
)
"""What to do about a chat template that writes the date."""


def _shows(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> bool:
    if not text.strip():
        return True
    # Tokenizers normalise letter case, Unicode forms and unknown characters: both texts are encoded and decoded.
    wanted = _without_space(tokenizer.decode(tokenizer.encode(text)))
    # A normalising tokenizer may join the first and the last character with the text around them.
    core = wanted[1:-1] if len(wanted) > _SHORT else wanted
    return bool(wanted) and core in _without_space(tokenizer.decode(prompt))


def _without_space(text: str) -> str:
    return "".join(text.split())
