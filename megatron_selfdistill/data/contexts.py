# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The two contexts of a response: the prompts of student and teacher, and the response after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class TeacherPrompt(NamedTuple):
    """The prompt of one of several teachers of a problem, as token ids."""

    teacher: str
    share: float
    """The share of this teacher's divergence in the loss of the response; the sum over the teachers is 1."""
    prompt: list[int]
    control_prompts: tuple[list[int], ...] = ()
    """The prompts of its controls, in its own wording."""


@dataclass(frozen=True)
class PromptPair:
    """Both prompts of one problem, as token ids; each leaves room for ``max_new_tokens``."""

    problem_id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    solution: str = ""
    """Part of the solution that the teacher's prompt shows."""
    solution_truncated: bool = False
    """Whether the teacher sees only a part of the solution, since the whole solution does not fit."""
    teacher: str = ""
    """Name of the teacher; see `Problem.teacher`."""
    of_teachers: tuple[TeacherPrompt, ...] = ()
    """The prompts of all teachers where there are several, of which the first is ``teacher_prompt``; else ()."""


@dataclass(frozen=True)
class EpisodeTurn:
    """The place of a response in an episode of several turns, and the texts around it, which samples show."""

    episode: int
    """The number of the episode among the samples of its problem, counted from 0."""
    turn: int
    """The number of the response within its episode, counted from 0."""
    reward: float
    """The reward of the response."""
    hint: str
    """The text that the teacher's prompt of this turn shows in place of a solution; "" without a teacher."""
    reply: str | None
    """The text of the environment after the response; None without one."""


@dataclass(frozen=True)
class ContextPair:
    """One response after two prompts, all as token ids.

    In both contexts the hidden state at position ``len(prompt) - 1 + i`` predicts ``response[i]``.
    """

    problem_id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    truncated: bool
    """Whether the response reached ``max_new_tokens`` without a stop token."""
    teacher: str = ""
    """Name of the teacher that reads ``teacher_prompt``; see `Problem.teacher`."""
    of_teachers: tuple[TeacherPrompt, ...] = ()
    """As in `PromptPair`, until the step is divided by teacher (teachers/teacher_groups.py)."""
    turn: EpisodeTurn | None = None
    """The place of the response in its episode; None if the run has no episodes of several turns."""
    control_prompts: tuple[list[int], ...] = ()
    """The teacher's prompts with the hints of other problems, one for each control of the target."""

    @property
    def readings(self) -> tuple[list[int], ...]:
        """The prompts after which the teacher reads the response: its own, then those of the controls."""
        return self.teacher_prompt, *self.control_prompts

    @property
    def student_length(self) -> int:
        """Number of tokens of the student's prompt and the response."""
        return len(self.student_prompt) + len(self.response)


class SampledResponse(Protocol):
    """The part of a sampler's response that a context needs."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Token ids of the response, with its stop token where the model sampled one."""

    @property
    def truncated(self) -> bool:
        """Whether the response reached ``max_new_tokens`` without a stop token."""
