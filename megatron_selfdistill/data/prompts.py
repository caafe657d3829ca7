# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts of student and teacher as token ids, rendered by the chat template of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates, PromptView
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.errors import MissingChatTemplateError


def filled(template: str, texts: Mapping[str, str]) -> str:
    """Return ``template`` with a text for each of its slots, in one pass: a slot within a text stays as it is.

    Raises: KeyError for a slot without a text.
    """
    return _SLOT.sub(lambda match: texts[match[2]] if match[2] else f"{{{match[1]}}}", template)


class GenerationPrompts(NamedTuple):
    """The texts between the last message and the response, of the student and of the teacher."""

    student: str
    teacher: str


class PromptBuilder:
    """The builder of both prompts of a problem, each in its own view."""

    def __init__(self, tokenizer: Tokenizer, templates: PromptTemplates, show_contents: bool = True) -> None:
        """Let errors quote the problems and the chat template's own errors if ``show_contents`` is set."""
        self.tokenizer, self.templates, self.show_contents = tokenizer, templates, show_contents

    def student_text(self, problem: Problem, reply: Mapping[str, Any] | None = None) -> str:
        """Return the student's prompt as text.

        With ``reply``, the text is the messages with the reply at their end and without a generation prompt.
        """
        messages = self.student_messages(problem)
        return self.render([*messages, *([dict(reply)] if reply else [])], problem, self._student, reply is None)

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the token ids of the student's messages, up to and including the generation prompt."""
        return self.tokenizer.encode(self.render(self.student_messages(problem), problem, self._student, True))

    def teacher_prompt(self, problem: Problem, solution: str | None = None) -> list[int]:
        """Return the token ids of the teacher's messages, up to and including the generation prompt.

        The last user message has the teacher's wording.  ``solution`` replaces the problem's solution: a shortened
        solution, or one that the model has found itself.
        """
        messages = self.teacher_messages(problem, solution)
        return self.tokenizer.encode(self.render(messages, problem, self.view_of(problem), True))

    def shows_solution(self, problem: Problem) -> bool:
        """Return whether the wording of the problem's teacher has a slot for the solution."""
        return any(match[2] == "solution" for match in _SLOT.finditer(self._template_of(problem)))

    def filled_text(self, problem: Problem, template: str, slots: Mapping[str, str]) -> str:
        """Return the text of the messages, of which the reworded one is ``template``, filled, in the student's view.

        ``slots``: the texts of the slots of ``template`` besides ``{problem}``.
        """
        return self.render(self._reworded(problem, template, slots, self._student), problem, self._student, True)

    def filled_prompt(self, problem: Problem, template: str, slots: Mapping[str, str]) -> list[int]:
        """Return the token ids of `filled_text`."""
        return self.tokenizer.encode(self.filled_text(problem, template, slots))

    def prompt_pair(self, problem: Problem, solution: str | None = None) -> tuple[list[int], list[int]]:
        """Return the student's and the teacher's prompt as token ids, up to and including their generation prompts.

        The generation prompt is the text that ``add_generation_prompt`` adds, or `PromptView.generation_prompt`.  Both
        prompts end in the same one, unless their views have other variables of the chat template or generation prompts
        of their own.  Its first token may also have the end of the message before it (a question mark and two line
        feeds can be one token); that token belongs to the message, and may differ.

        Raises: ValueError if the views ask for the same generation prompt, and student and teacher would not begin
        their response after the same token ids.
        """
        texts = self.pair_texts(problem, solution)
        return self.pair_of(problem, texts, self.tokenizer.encode_batch(texts))

    def pair_texts(self, problem: Problem, solution: str | None = None) -> tuple[str, str, str, str]:
        """Return the texts for `pair_of`: of the student without and with generation prompt, then of the teacher."""
        student, teacher = self.student_messages(problem), self.teacher_messages(problem, solution)
        before, prompt, teacher_before, teacher_prompt = (
            self.render(messages, problem, view, flag)
            for messages, view in ((student, self._student), (teacher, self.view_of(problem)))
            for flag in (False, True)
        )
        return before, prompt, teacher_before, teacher_prompt

    def generation_prompts(self, problem: Problem) -> GenerationPrompts:
        """Return the texts after which student and teacher read the response to a problem."""
        texts = self.pair_texts(problem)
        ids, decode = self.tokenizer.encode_batch(texts), self.tokenizer.decode
        student, teacher = (_split_prompt(texts[at : at + 2], ids[at : at + 2], decode) for at in (0, 2))
        return GenerationPrompts(student.generation_text, teacher.generation_text)

    def pair_of(self, problem: Problem, texts: Sequence[str], ids: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Return `prompt_pair` of a problem whose ``texts`` from `pair_texts` are encoded as ``ids``."""
        views = self._student, self.view_of(problem)
        own, other = ((view.chat_template_kwargs, view.generation_prompt) for view in views)
        if own != other:  # they say how the ends of the prompts differ
            return ids[1], ids[3]
        decode = self.tokenizer.decode
        student, teacher = (_split_prompt(texts[at : at + 2], ids[at : at + 2], decode) for at in (0, 2))
        skip = 1 if student.joins_message or teacher.joins_message else 0
        if student.generation_text != teacher.generation_text or student.tail[skip:] != teacher.tail[skip:]:
            got = (
                f"{decode(student.tail)!r} {student.tail} for the student and {decode(teacher.tail)!r} "
                f"{teacher.tail} for the teacher"
            )
            raise ValueError(
                f"{problem.location}: expected both contexts to end in the same generation prompt, got "
                f"{got if self.show_contents else 'different ones'}; the chat template depends on the text of the "
                "message: change data.teacher_template, fix the generation prompt with data.chat_template_kwargs, or "
                "give student and teacher their own with data.views."
            )
        return student.ids, teacher.ids

    @property
    def _student(self) -> PromptView:
        return self.templates.student_view

    def view_of(self, problem: Problem) -> PromptView:
        """Return the form of the prompt of the problem's teacher."""
        return self.templates.views_of_teachers.get(problem.teacher, self.templates.teacher_view)

    def student_messages(self, problem: Problem) -> list[dict[str, Any]]:
        """Return the student's messages."""
        return self._reworded(problem, self.templates.student, {}, self._student)

    def teacher_messages(self, problem: Problem, solution: str | None) -> list[dict[str, Any]]:
        """Return the teacher's messages; ``solution``: as for `teacher_prompt`."""
        solution = problem.solution if solution is None else solution
        return self._reworded(problem, self._template_of(problem), {"solution": solution}, self.view_of(problem))

    def _template_of(self, problem: Problem) -> str:
        return self.templates.of_teachers.get(problem.teacher, self.templates.teacher)

    def _reworded(
        self, problem: Problem, template: str, slots: Mapping[str, str], view: PromptView
    ) -> list[dict[str, Any]]:
        messages = [dict(message) for message in problem.messages]
        index = reworded_message(problem)
        messages[index]["content"] = filled(template, {"problem": messages[index]["content"], **slots})
        if view.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": view.system_prompt})
        return messages

    def render(
        self, messages: list[dict[str, Any]], problem: Problem, view: PromptView, add_generation_prompt: bool
    ) -> str:
        """Return messages about a problem as text.  Raises: ValueError if the chat template refuses them."""
        kwargs, own = dict(view.chat_template_kwargs), view.generation_prompt if add_generation_prompt else None
        if problem.tools:
            kwargs["tools"] = list(problem.tools)
        adds = add_generation_prompt and own is None
        try:
            return self.tokenizer.render_chat(messages, add_generation_prompt=adds, **kwargs) + (own or "")
        except MissingChatTemplateError:
            raise
        except Exception as error:  # a template is a program and can raise any exception
            if not self.show_contents:
                message = f"{problem.location}: the chat template refused the messages ({type(error).__name__})"
                raise ValueError(message) from None
            raise ValueError(f"{problem.location}: the chat template refused the messages: {error}") from error


def last_user_text(problem: Problem) -> str:
    """Return the text of the problem's reworded message, which fills the slot ``{problem}``."""
    text: str = problem.messages[reworded_message(problem)]["content"]
    return text


def reworded_message(problem: Problem) -> int:
    """Return the index of the message that the templates reword: `Problem.reworded`, or the last user message."""
    if problem.reworded is not None:
        return problem.reworded
    return max(index for index, message in enumerate(problem.messages) if message["role"] == "user")


@dataclass(frozen=True)
class _SplitPrompt:
    """A prompt's ids and their tail, which follows what the same prompt without generation prompt begins with."""

    ids: list[int]
    tail: list[int]
    generation_text: str
    joins_message: bool
    """Whether the tail begins within the message, so that one token spans the boundary."""


def _split_prompt(
    texts: Sequence[str], encoded: Sequence[list[int]], decode: Callable[[list[int]], str]
) -> _SplitPrompt:
    """Return the ``encoded`` prompt with generation prompt, the second of ``texts``, split at its generation prompt.

    A template that writes an end without a generation prompt (Phi-3) has other tokens there, not none.
    """
    (before, whole), (before_ids, ids), equal = texts, encoded, 0
    while equal < min(len(before_ids), len(ids)) and before_ids[equal] == ids[equal]:
        equal += 1
    is_added = whole.startswith(before)
    text = whole[len(before) :] if is_added else decode(ids[equal:])
    return _SplitPrompt(ids, ids[equal:], text, joins_message=is_added and equal < len(before_ids))


# `{{name}}` is a literal `{name}` (group 1), `{name}` a slot (group 2); all other braces are text.
_SLOT = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
