# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Prompts that fit into a context, and the contexts of responses after them.

A solution, or a problem, can be too long: data.on_long_context says what happens then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_selfdistill.data.contexts import PromptPair, TeacherPrompt
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_checks import hint_cost
from megatron_selfdistill.data.prompts import PromptBuilder

_CUTS: dict[str, Callable[[str, int], str]] = {
    "truncate_start": lambda solution, length: solution[len(solution) - length :],
    "truncate_end": lambda solution, length: solution[:length],
}


def _fit_all_teachers(
    builder: PromptBuilder, problem: Problem, policy: str, limits: Mapping[str, int]
) -> PromptPair | None:
    prompts: list[TeacherPrompt] = []
    pairs: list[PromptPair] = []
    for name, share in problem.shares:
        pair = fit_teacher_prompt(builder, replace(problem, teacher=name, shares=()), policy=policy, **limits)
        if pair is None:
            return None
        pairs.append(pair)
        prompts.append(TeacherPrompt(name, share, pair.teacher_prompt))
    truncated = any(pair.solution_truncated for pair in pairs)
    return replace(pairs[0], of_teachers=tuple(prompts), solution_truncated=truncated)


def shortened_to_fit(
    builder: PromptBuilder, problem: Problem, student: list[int], teacher: list[int], room: int, policy: str
) -> PromptPair | None:
    """Return the result of `fit_teacher_prompt` for encoded prompts of at most ``room`` tokens.

    ``policy`` is not "error".
    """
    pair = PromptPair(problem.id, student, teacher, problem.solution, teacher=problem.teacher)
    if len(student) > room or (policy == "drop" and len(teacher) > room):
        return None
    if len(teacher) <= room:
        return pair
    shorter = _longest_fitting(builder, problem, room, _CUTS[policy])
    if shorter is None:
        return None
    solution, teacher = shorter
    return replace(pair, teacher_prompt=teacher, solution=solution, solution_truncated=True)


def _longest_fitting(
    builder: PromptBuilder, problem: Problem, room: int, cut: Callable[[str, int], str]
) -> tuple[str, list[int]] | None:
    """Return the part of the solution that fits and the prompt with it; None if only white space fits."""
    # The bisection is over characters of the solution, not over its tokens: a token can end within a character, and
    # the text of tokens is not always encoded into the same tokens again.  Every candidate is a complete prompt.
    if len(builder.teacher_prompt(problem, "")) > room:
        return None
    fits, too_long = 0, len(problem.solution)
    while too_long - fits > 1:
        length = (fits + too_long) // 2
        if len(builder.teacher_prompt(problem, cut(problem.solution, length))) <= room:
            fits = length
        else:
            too_long = length
    kept = cut(problem.solution, fits)
    if not kept.strip():
        return None
    _, teacher = builder.prompt_pair(problem, kept)
    return kept, teacher


def fit_teacher_prompt(
    builder: PromptBuilder, problem: Problem, *, max_length: int, max_new_tokens: int, policy: str
) -> PromptPair | None:
    """Return both prompts of a problem, each of at most ``max_length - max_new_tokens`` tokens, or None.

    ``policy`` decides where the teacher's prompt is too long:

    - "error" raises ValueError;
    - "drop" returns None;
    - "truncate_start" keeps the longest end of the solution that fits, and "truncate_end" its longest start.

    A student's prompt that is too long, and a teacher's prompt into which no part of the solution fits, cannot be
    truncated: the policy "error" raises ValueError, and each other policy returns None.

    Raises: ValueError also if the two prompts do not end in the same generation prompt.
    """
    room = max_length - max_new_tokens
    if problem.shares:
        return _fit_all_teachers(builder, problem, policy, {"max_length": max_length, "max_new_tokens": max_new_tokens})
    student, teacher = builder.prompt_pair(problem)
    if policy == "error":
        whose, prompt, parts, remedy = "student", student, "", "set data.on_long_context=drop"
        if len(student) <= room < len(teacher):
            cost = hint_cost(builder, problem, student, teacher)
            whose, prompt = "teacher", teacher
            remedy = "set a shorter data.teacher_template or data.on_long_context=drop, truncate_start or truncate_end"
            parts = (
                f" ({len(student)} of them in the student's prompt too, {cost.wording} of data.teacher_template, "
                f"{cost.solution} of the solution)"
            )
        if len(prompt) > room:
            raise ValueError(
                f"{problem.location}: expected a {whose}'s prompt of at most {room} tokens (data.max_length "
                f"{max_length} less rollout.max_new_tokens {max_new_tokens}), got {len(prompt)}{parts}; raise "
                f"data.max_length, lower rollout.max_new_tokens, or {remedy}."
            )
    return shortened_to_fit(builder, problem, student, teacher, room, policy)
