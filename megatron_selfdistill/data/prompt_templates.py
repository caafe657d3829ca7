# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The wording and the form of the prompts of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.config.schema.field_checks import require_slots

DEFAULT_TEACHER_TEMPLATE = """\
{problem}

Here is a solution to this problem, for your eyes only:

{solution}

Use it only as a hint. Reason in your own words, step by step, from the problem itself to the final answer, as
if you had not seen the solution. Never mention that a solution was given."""


@dataclass(frozen=True)
class PromptView:
    """The form of a prompt around its wording."""

    system_prompt: str | None = None
    """System message, for messages that begin without one."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as ``enable_thinking``."""
    generation_prompt: str | None = None
    """The text after the last message, after which the response begins; None is what the chat template writes there."""


@dataclass(frozen=True)
class PromptTemplates:
    """The wording and the form of both prompts.

    ``{problem}`` and ``{solution}`` are slots; a text that fills a slot may contain braces.  All other braces are plain
    text, except where they look like a slot: write ``{{name}}`` for a literal ``{name}``.

    Raises: `ConfigError` for a missing or an unknown slot.
    """

    teacher: str = DEFAULT_TEACHER_TEMPLATE
    """Wording of the last user message for the teacher, with both slots."""
    student: str = "{problem}"
    """Wording of the last user message for the student, with the slot ``{problem}`` only."""
    student_view: PromptView = field(default_factory=PromptView)
    """Form of the student's prompt, and of every prompt that is neither the student's nor the teacher's."""
    teacher_view: PromptView = field(default_factory=PromptView)
    """Form of the teacher's prompt."""
    of_teachers: Mapping[str, str] = field(default_factory=dict)
    """Name of a teacher -> its wording in place of ``teacher``, in which the slot ``{solution}`` may be missing."""
    views_of_teachers: Mapping[str, PromptView] = field(default_factory=dict)
    """Name of a teacher -> the form of its prompt in place of ``teacher_view``."""

    def __post_init__(self) -> None:
        require_slots("data.teacher_template", self.teacher, ("problem", "solution"))
        require_slots("data.student_template", self.student, ("problem",))
