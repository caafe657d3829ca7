# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Episodes that are one sequence of tokens: what a chat template writes between a response and the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.data.episode_reply import REPLY_ROLES
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.thoughts import END_OF_THOUGHTS, THINK
from megatron_selfdistill.errors import ConfigError


def require_bridges(builder: PromptBuilder, problem: Problem, has_teacher: bool) -> None:
    """Raise `ConfigError` if the chat template lets no message follow a response that stays as it was sampled."""
    errors = []
    for role in REPLY_ROLES:
        reply = {"role": role, "content": "A reply."}
        try:
            bridge(builder, problem, None, reply, -1)
            if has_teacher:
                bridge(builder, problem, problem.solution, reply, -1)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(REPLY_ROLES):
        raise ConfigError(str(errors[0]))


def bridge(
    builder: PromptBuilder, problem: Problem, solution: str | None, reply: Mapping[str, Any], stop_id: int
) -> list[int]:
    """Return the token ids between a response to ``problem`` and the next one: the message ``reply`` and around it.

    ``solution``: what the teacher sees; None is the student's conversation.  The ids begin behind the last token of the
    response, ``stop_id``: a chat template that ends a turn with another token writes its own after it.
    Raises: ValueError if the chat template shows the response in another way once a message follows it.
    """
    if solution is None:
        messages, view = builder.student_messages(problem), builder.templates.student_view
    else:
        messages, view = builder.teacher_messages(problem, solution), builder.view_of(problem)
    before = builder.render(messages, problem, view, True)
    begin = "" if before.rstrip().endswith(THINK) else f"{THINK}\n"
    said = f"{begin}A thought.\n{END_OF_THOUGHTS}\n\nAn answer."
    whole = builder.render([*messages, {"role": "assistant", "content": said}, dict(reply)], problem, view, True)
    if not whole.startswith(before + said):
        raise ValueError(
            f"{problem.location}: the chat template rewrites a response once a message of the role "
            f"{reply['role']} follows it (many drop the thoughts), so that the episode is not one sequence: set "
            "environment.limits.one_sequence=false, or give a data.chat_template that keeps responses as they are"
        )
    ids = builder.tokenizer.encode(whole[len(before + said) :])
    if stop_id in ids and not builder.tokenizer.decode(ids[: ids.index(stop_id)]).strip():
        return ids[ids.index(stop_id) + 1 :]
    return ids
