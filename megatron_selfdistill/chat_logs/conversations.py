# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged conversations, and their assistant turns as problems whose solution is the accepted answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from megatron_selfdistill.chat_logs.acceptance import Rule, answer_text
from megatron_selfdistill.config.functions import own_lines
from megatron_selfdistill.data.messages import from_column, place, read_message, read_tools
from megatron_selfdistill.data.problems import AssistantReply, Problem, ProblemSet
from megatron_selfdistill.data.records import RecordSource, kind, read_records, whole_number
from megatron_selfdistill.errors import BadRecordError

FIELDS = ("messages", "accepted", "tools", "id")

_MAY_FOLLOW: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer", "user"),
    "developer": ("system", "developer", "user"),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool calls": ("tool",),
    "tool": ("tool", "assistant"),
}


class UnresolvedError(BadRecordError):
    """A logged conversation in which no mark and no rule names an answer that the user accepted."""


@dataclass(frozen=True)
class Conversation:
    """One conversation of a log."""

    id: str
    messages: tuple[dict[str, Any], ...]
    """Messages with texts as strings, without nulls and marks."""
    accepted: int
    """Index of the message with the accepted answer: of the assistant, or of the user who gave the answer."""
    marked: bool
    """Whether a mark in the log names the accepted answer, and not the rule."""
    tools: tuple[dict[str, Any], ...]
    location: str


@dataclass(frozen=True)
class ConversationSet:
    """The turns of the conversations of a data set, in its order."""

    turns: ProblemSet
    """One problem per assistant turn up to the accepted answer; ``skipped`` has the skipped conversations."""
    about: str
    """The numbers of conversations and turns, for the log."""


def load_conversations(source: RecordSource, *, rule: Rule | None, turns: str, show_contents: bool) -> ConversationSet:
    """Read and check all conversations of ``source``, and return their turns.

    A record has ``messages`` in the style of OpenAI: system or developer first, then user, assistant and tool; the
    content is a string or a list of text parts, and null beside tool calls.  It may have ``tools`` (schemas of
    functions), ``id`` and ``accepted``: the index of the message with the accepted answer, counted from 0.  The mark
    may be ``"accepted": true`` on the message.  A user's message has the mark where the user gave the answer.  In a
    record without a mark, ``rule(messages)`` returns the index, or None.  ``messages`` and ``tools`` may be their
    JSON as text.

    - ``turns``: "all", which includes the accepted turn with its own text as the hint, or "before_accepted".  Turns
      after the accepted answer are never included, since nobody judged them.  The hint is the `answer_text` of the
      accepted message.
    - ``rule``: None ignores acceptance.  Then every assistant turn that a message follows becomes a problem without a
      solution, whose reply has these messages as its ``next_state``.
    - ``show_contents``: whether messages may quote the log; otherwise they have places, roles and numbers only.

    Raises: ValueError, which names file and line, for a bad record (``on_bad_record="error"``), and for a log without
    any turn; FileNotFoundError for a missing file.
    """
    columns = {name: column for name in FIELDS if (column := source.fields.get(name, name)) is not None}
    seen: set[str] = set()

    def read(record: dict[str, Any], location: str) -> Conversation:
        conversation = _conversation(record, columns, rule, location, seen)
        seen.add(conversation.id)
        return conversation

    found, errors = read_records(source, read, quotes=show_contents)
    skipped = list(errors)
    by_next_state = rule is None
    problems = [turn for conversation in found for turn in conversation_turns(conversation, turns, by_next_state)]
    if not problems:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(
            f"{source.path}: expected conversations with an assistant turn to train on (turns {turns}), got none: "
            f"{len(found)} good ones, {len(skipped)} bad{first}"
        )
    if by_next_state:
        about = f"{len(problems)} replies that a message follows"
    else:
        num_marked = sum(conversation.marked for conversation in found)
        with_turns = {problem.location.rpartition(", message ")[0] for problem in problems}
        num_at_once = sum(conversation.location not in with_turns for conversation in found)
        num_later = sum(message["role"] == "assistant" for c in found for message in c.messages[c.accepted + 1 :])
        about = (
            f"the accepted answer of {num_marked} marked in the log and of {len(found) - num_marked} found by the "
            f"rule; {num_at_once} without a turn to train on; {num_later} turns after the accepted answer skipped"
        )
    num_unresolved = sum(isinstance(error, UnresolvedError) for error in errors.values())
    about += f"; skipped as unresolved: {num_unresolved}, as bad: {len(skipped) - num_unresolved}"
    return ConversationSet(ProblemSet(problems, len(skipped), skipped), f"{len(found)} conversations, {about}")


def conversation_turns(conversation: Conversation, turns: str, by_next_state: bool = False) -> list[Problem]:
    """Return one problem for each assistant message up to the accepted answer.

    Its messages are those before the assistant message, its solution is the accepted answer, and its logged reply is
    the assistant message.  ``turns`` is "all" or "before_accepted".  ``by_next_state``: whether the reply instead has
    the messages that follow it as its next state; the problem then has no solution, and no reply counts as accepted.
    """
    messages, accepted = conversation.messages, conversation.accepted
    end = accepted + 1 if turns == "all" else accepted
    return [
        Problem(
            id=f"{conversation.id}/{index}",
            messages=messages[:index],
            solution="" if by_next_state else answer_text(messages[accepted]),
            answer=None,
            location=f"{conversation.location}, message {index}",
            tools=conversation.tools,
            reply=AssistantReply(
                message,
                accepted=not by_next_state and index == accepted,
                next_state=tuple(takewhile(lambda after: after["role"] != "assistant", messages[index + 1 :]))
                if by_next_state
                else (),
            ),
        )
        for index, message in enumerate(messages[:end])
        if message["role"] == "assistant"
    ]


def _conversation(
    record: Mapping[str, Any], columns: Mapping[str, str], rule: Rule | None, location: str, seen: set[str]
) -> Conversation:
    raw = from_column(record.get(columns["messages"]), columns["messages"])
    if not isinstance(raw, (list, tuple)) or not raw:
        raise BadRecordError(
            f"field {columns['messages']!r}: expected a non-empty list of messages, got {kind(raw)}", raw
        )
    messages = tuple(_message(message, place(columns["messages"], i)) for i, message in enumerate(raw))
    _check_order(messages, columns)
    if rule is not None:
        accepted, is_marked = _accepted(record, raw, messages, columns, rule)
    elif answered := [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]:
        accepted, is_marked = answered[-1], False
    else:
        raise UnresolvedError("unresolved: expected a message after a reply of the assistant, got none")
    conversation_id = record.get(columns["id"])
    if conversation_id is None:
        content = json.dumps([messages, accepted], sort_keys=True, default=str)
        conversation_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        while conversation_id in seen:  # logs repeat themselves
            conversation_id += "-"
    elif str(conversation_id) in seen:
        raise BadRecordError(f"field {columns['id']!r}: expected a new id, got one of an earlier record")
    return Conversation(
        str(conversation_id),
        messages,
        accepted,
        is_marked,
        read_tools(record.get(columns["tools"]), columns["tools"]),
        location,
    )


def _message(message: object, where: str) -> dict[str, Any]:
    read = read_message(message, where)
    mark, role = read.pop("accepted", None), read["role"]
    if mark is not None and not isinstance(mark, bool):
        raise BadRecordError(f"{where}: expected true, false or null as 'accepted', got {kind(mark)}", mark)
    if role not in _MAY_FOLLOW or " " in role:
        known = ", ".join(role for role in _MAY_FOLLOW if " " not in role)
        raise BadRecordError(f"{where}: expected a role among {known}, got a text that is not among them", role)
    if "tool_calls" in read and role != "assistant":
        raise BadRecordError(f"{where}: expected tool calls of an assistant only, got tool calls of a {role}")
    text = read.pop("content", "")
    if role != "tool" and "tool_calls" not in read and not text.strip():
        raise BadRecordError(f"{where}: expected a text as the content of the {role}, got an empty one")
    return read | {"content": text} if text or role == "tool" else read


def _check_order(messages: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    previous = "the beginning"
    allowed: tuple[str, ...] = ("system", "developer", "user")
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in allowed:
            raise BadRecordError(
                f"{place(columns['messages'], index)}: expected {' or '.join(allowed)} after {previous}, got {role}"
            )
        previous = "assistant with tool calls" if "tool_calls" in message else role
        allowed = _MAY_FOLLOW[previous]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError(f"field {columns['messages']!r}: expected an assistant turn, got none")


def _accepted(
    record: Mapping[str, Any],
    raw: Sequence[Mapping[str, Any]],
    messages: Sequence[dict[str, Any]],
    columns: Mapping[str, str],
    rule: Rule,
) -> tuple[int, bool]:
    """Return the index of the message with the accepted answer, and whether the log marks it."""
    where = f"field {columns['accepted']!r}"
    given = record.get(columns["accepted"])
    marks = [i for i, message in enumerate(raw) if message.get("accepted") is True]
    whole = isinstance(given, int) or (isinstance(given, float) and given.is_integer())  # columns with nulls are float
    if isinstance(given, bool) or not (given is None or whole):
        raise BadRecordError(f"{where}: expected the index of a message, got {kind(given)}", given)
    if given is not None:
        marks.append(int(given))
    if len(set(marks)) > 1:
        raise BadRecordError(f"{where}: expected one accepted message, got marks on {sorted(set(marks))}")
    index = marks[0] if marks else _by_rule(rule, messages)
    if index is None:
        raise UnresolvedError("unresolved: expected a mark, or a closing user turn that the rule takes for acceptance")
    if not 0 <= index < len(messages):
        raise BadRecordError(f"{where}: expected an index below {len(messages)}, got {index}")
    role = messages[index]["role"]
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if role not in ("assistant", "user") or index < first or not answer_text(messages[index]):
        raise BadRecordError(
            f"{where}: expected message {index} to be an assistant's with text, or a user's after one, got a {role}'s"
        )
    return index, bool(marks)


def _by_rule(rule: Rule, messages: Sequence[dict[str, Any]]) -> int | None:
    name = getattr(rule, "__name__", type(rule).__name__)
    try:
        index = rule([dict(message) for message in messages])
    except Exception as error:  # the rule may be the user's, and its message may quote the log
        failure = f"the rule {name} for the accepted answer failed with {type(error).__name__}{own_lines(error)}"
        raise BadRecordError(failure, str(error)) from None
    number = None if index is None else whole_number(index)
    if number is None and index is not None:
        raise BadRecordError(f"the rule {name}: expected the index of a message or None, got {kind(index)}")
    return number
