# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The two contexts of a response: the student's prompt and the teacher's, before and after sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_selfdistill.choices import LONG_CONTEXT_POLICIES
from megatron_selfdistill.data.hints import hint_cost
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder


@dataclass(frozen=True)
class PromptPair:
    """Both prompts of one problem, as token ids. Each leaves room for ``max_new_tokens``."""

    problem_id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    solution: str = ""
    """What the teacher's prompt shows of the solution."""
    solution_truncated: bool = False
    """The teacher sees only a part of the solution, since the whole did not fit."""


@dataclass(frozen=True)
class ContextCounts:
    """What became of the problems: all but ``dropped`` are in the batch."""

    kept: int = 0
    """Fitted as they were."""
    truncated: int = 0
    """Kept with a shortened solution."""
    dropped: int = 0

    def __add__(self, other: ContextCounts) -> ContextCounts:
        return ContextCounts(self.kept + other.kept, self.truncated + other.truncated, self.dropped + other.dropped)


@dataclass(frozen=True)
class ContextPair:
    """One response behind two prompts, all as token ids.

    In both contexts the hidden state at position ``len(prompt) - 1 + i`` predicts ``response[i]``.
    """

    problem_id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    truncated: bool
    """The response reached ``max_new_tokens`` without a stop token."""

    @property
    def student_length(self) -> int:
        """Tokens of the student's prompt and the response."""
        return len(self.student_prompt) + len(self.response)

    @property
    def teacher_length(self) -> int:
        """Tokens of the teacher's prompt and the response."""
        return len(self.teacher_prompt) + len(self.response)


class SampledResponse(Protocol):
    """What is asked of a sampler's response."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The response, with its stop token where the model wrote one."""

    @property
    def truncated(self) -> bool:
        """It reached ``max_new_tokens`` without a stop token."""


def plan_contexts(
    builder: PromptBuilder, problems: Sequence[Problem], *, max_length: int, max_new_tokens: int, policy: str
) -> tuple[list[PromptPair], ContextCounts]:
    """``fit_teacher_prompt`` for each problem: the pairs that fit, in order, and how many did."""
    pairs = []
    for problem in problems:
        pair = fit_teacher_prompt(builder, problem, max_length=max_length, max_new_tokens=max_new_tokens, policy=policy)
        if pair is not None:
            pairs.append(pair)
    truncated = sum(pair.solution_truncated for pair in pairs)
    return pairs, ContextCounts(len(pairs) - truncated, truncated, len(problems) - len(pairs))


def fit_teacher_prompt(
    builder: PromptBuilder, problem: Problem, *, max_length: int, max_new_tokens: int, policy: str
) -> PromptPair | None:
    """Both prompts of a problem, each with prompt + ``max_new_tokens`` <= ``max_length`` (in tokens).

    ``policy``, where the teacher's prompt is too long:
      ``error``           ValueError;
      ``drop``            None;
      ``truncate_start``  the longest end of the solution that fits, rendered again; ``truncate_end`` its
      longest start.
    A student's prompt that is too long, or a teacher's in which nothing of the solution fits, cannot be
    truncated: it is an error under ``error`` and dropped otherwise.

    Raises: ValueError also if the two prompts do not end in the same generation prompt.
    """
    if policy not in LONG_CONTEXT_POLICIES:
        raise ValueError(f"data.on_long_context: expected one of {', '.join(LONG_CONTEXT_POLICIES)}, got {policy!r}.")
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"Expected rollout.max_new_tokens to leave room for a prompt, got {max_new_tokens} of data.max_length "
            f"{max_length}; raise data.max_length or lower rollout.max_new_tokens."
        )
    student, teacher = builder.prompt_pair(problem)
    if policy == "error":
        whose, prompt, parts, remedy = "student", student, "", "data.on_long_context=drop"
        if len(student) <= room < len(teacher):
            cost = hint_cost(builder, problem, student, teacher)
            whose, prompt, remedy = "teacher", teacher, "data.on_long_context to drop, truncate_start or truncate_end"
            parts = (
                f" ({len(student)} of them in the student's prompt too, {cost.wording} of data.teacher_template, "
                f"{cost.solution} of the solution)"
            )
        if len(prompt) > room:
            raise ValueError(
                f"{problem.location}: expected a {whose}'s prompt of at most {room} tokens (data.max_length "
                f"{max_length} less rollout.max_new_tokens {max_new_tokens}), got {len(prompt)}{parts}; raise "
                f"data.max_length, lower rollout.max_new_tokens, or set {remedy}."
            )
    return shortened_to_fit(builder, problem, student, teacher, room, policy)


def shortened_to_fit(
    builder: PromptBuilder, problem: Problem, student: list[int], teacher: list[int], room: int, policy: str
) -> PromptPair | None:
    """`fit_teacher_prompt` of prompts that are encoded already, each within ``room`` tokens; ``policy``: not error."""
    pair = PromptPair(problem.id, student, teacher, problem.solution)
    if len(student) > room:
        return None
    if len(teacher) <= room:
        return pair
    if policy == "drop":
        return None
    shorter = _longest_fitting(builder, problem, room, _CUTS[policy])
    if shorter is None:
        return None
    solution, teacher = shorter
    return replace(pair, teacher_prompt=teacher, solution=solution, solution_truncated=True)


def build_contexts(prompt_pairs: Sequence[PromptPair], responses: Sequence[SampledResponse]) -> list[ContextPair]:
    """One context pair per response; ``prompt_pairs[i]`` is what ``responses[i]`` answers.

    For several samples of a problem its pair is repeated. Responses stay the token ids that were sampled.
    """
    if len(prompt_pairs) != len(responses):
        raise ValueError(
            f"Expected one prompt pair per response, got {len(prompt_pairs)} pairs and {len(responses)} responses."
        )
    return [
        ContextPair(
            pair.problem_id,
            pair.student_prompt,
            pair.teacher_prompt,
            list(response.token_ids),
            response.truncated,
        )
        for pair, response in zip(prompt_pairs, responses, strict=True)
    ]


_CUTS: dict[str, Callable[[str, int], str]] = {
    "truncate_start": lambda solution, length: solution[len(solution) - length :],
    "truncate_end": lambda solution, length: solution[:length],
}


def _longest_fitting(
    builder: PromptBuilder, problem: Problem, room: int, cut: Callable[[str, int], str]
) -> tuple[str, list[int]] | None:
    """Return the part of the solution that fits and the prompt with it; None where only white space fits."""
    # Bisection over characters of the solution, not over its tokens: tokens can end within a character, and
    # their text is not always encoded into the same tokens again. Every candidate is rendered and counted as
    # a whole prompt.
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
