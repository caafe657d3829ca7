# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Problems with solutions, read from files or a hub data set, and the sampler of global batches."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_selfdistill.data.messages import from_column, place, read_message, read_tools
from megatron_selfdistill.data.records import RecordSource, RecordTeachers, kind, read_records
from megatron_selfdistill.errors import BadRecordError, ConfigError

FIELDS = ("problem", "messages", "tools", "solution", "answer", "id")


@dataclass(frozen=True)
class AssistantReply:
    """The reply of an assistant to the messages of a problem, with what is known about it."""

    message: dict[str, Any]
    """The message in the style of OpenAI; the arguments of tool calls are objects."""
    accepted: bool
    """Whether the user accepted this reply."""
    next_state: tuple[dict[str, Any], ...] = ()
    """The messages between this reply and the next one, of the user or of tools, where hints come from them."""


@dataclass(frozen=True)
class Problem:
    """One problem with the solution that only the teacher sees."""

    id: str
    """Id, unique within the data set; the seeds of sampled responses depend on it."""
    messages: tuple[dict[str, Any], ...]
    """Messages that the student answers, in the style of OpenAI; the text of a problem is one user message.  The last
    message is never a reply."""
    solution: str
    """Solution that only the teacher sees; "" in a run whose model finds its own solutions."""
    answer: str | None
    """Final answer for a verifier; None if the data has none."""
    location: str
    """Place of the record for messages: ``file:line`` (JSONL) or ``file:row``, counted from 1."""
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas of functions for the chat template, as in the data."""
    reply: AssistantReply | None = None
    """The reply to ``messages``, if the problem is a turn of a conversation."""
    reworded: int | None = None
    """Index of the message that the templates of both prompts reword; None is the last user message.  A later turn
    sets the index, since its last user message can be a reply to the response before."""
    teacher: str = ""
    """Name of the teacher of the responses, one of the key ``teachers``, and of several teachers the first by name; ""
    in a run without this key."""
    shares: tuple[tuple[str, float], ...] = ()
    """Name and share of each teacher where the record has several, in the order of the names; the sum of the shares is
    1.  () for one teacher."""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a data set, in its order, and the skipped records."""

    problems: list[Problem]
    num_skipped: int = 0
    """Number of skipped records."""
    skipped: list[str] = field(default_factory=list)
    """One message per skipped record, with place, field, expected and found value."""

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the ids and texts in order; it does not depend on names and places of the files."""
        digest = hashlib.sha256()
        of_message: dict[int, str] = {}  # the turns of a conversation share their messages

        def hashed(message: Mapping[str, Any]) -> str:
            if id(message) not in of_message:
                of_message[id(message)] = hashlib.sha256(_json(message)).hexdigest()
            return of_message[id(message)]

        for problem in self.problems:
            content: list[Any] = [problem.id, problem.messages, problem.solution, problem.answer]
            if problem.reply is not None:
                content[1] = [hashed(message) for message in problem.messages]
                content += [hashed(problem.reply.message), problem.reply.accepted, problem.tools]
                content += [hashed(message) for message in problem.reply.next_state]
            elif problem.tools:
                content.append(problem.tools)
            if problem.teacher:
                content.append(problem.shares or problem.teacher)
            digest.update(_json(content))
        return digest.hexdigest()[:16]


def load_problems(source: RecordSource, *, require_solution: bool) -> ProblemSet:
    """Read and validate all problems of ``source``.

    A record has a ``problem`` (text), or ``messages`` (a list, or its JSON as text) with optional ``tools``, and a
    ``solution``; ``answer``, ``id`` and, where ``source.teachers`` are given, ``teacher`` are optional.  A missing id
    is derived from the record's content, with ``-1``, ``-2`` .. for repetitions.
    JSON is read line by line here, since ``datasets`` does not name a malformed line; Parquet files and data sets of
    the hub are read with ``datasets``.  ``require_solution``: whether a record without a solution is bad;
    otherwise its solution is "".  Where the field ``solution`` is not read, every solution is "".

    Raises: ValueError, which names file, line, field, expected and found value, for a bad record, two equal ids and an
    empty set; FileNotFoundError for a missing file.
    """
    columns = {name: source.fields.get(name, name) for name in FIELDS}
    places: dict[str, str] = {}
    seen_columns: set[str] = set()

    def read(record: dict[str, Any], location: str) -> Problem:
        seen_columns.update(record)
        problem = _problem(record, location, columns, places, require_solution, source.teachers)
        places[problem.id] = location
        return problem

    problems, skipped = read_records(source, read, quotes=True)
    if not problems:
        first = f" The first: {next(iter(skipped))}" if skipped else ""
        raise ValueError(f"{source.path}: expected at least one problem, got none ({len(skipped)} bad records).{first}")
    _check_columns_exist(source, seen_columns)
    return ProblemSet(problems, len(skipped), list(skipped))


def with_solutions_from(source: str, problems: Sequence[Problem], seed: int, *, required: bool = True) -> list[Problem]:
    """Return the problems with the texts that ``data.solutions`` shows to the teacher.

    given: the solutions.  answer: the answers.  none: empty texts.  other: each problem has the solution of another
    one with another text: the next such one in an order that is shuffled by ``seed`` and begins anew after its end.
    ``required``: whether each problem must have an answer; otherwise its text is empty where it has none.

    Raises: `ConfigError` for a problem without a required answer, and if all solutions are one text.
    """
    if source == "answer":
        return [replace(it, solution=_answer_of(it) if required else it.answer or "") for it in problems]
    if source == "none":
        return [replace(problem, solution="") for problem in problems]
    return _with_other_solutions(problems, seed) if source == "other" else list(problems)


def _answer_of(problem: Problem) -> str:
    if not problem.answer:
        raise ConfigError(
            f"{problem.location}: expected an answer, which data.solutions=answer shows to the teacher, got none: set "
            "data.fields.answer"
        )
    return problem.answer


def _with_other_solutions(problems: Sequence[Problem], seed: int) -> list[Problem]:
    if len({problem.solution for problem in problems}) == 1:
        raise ConfigError(
            f"data.solutions=other shows the solution of another problem, but all {len(problems)} solutions are one "
            "text: give data with another hint, or use data.solutions=none"
        )
    order = list(range(len(problems)))
    random.Random(f"other solutions {seed}").shuffle(order)
    others: dict[int, str] = {}
    # Backwards and twice around, so that the next other text of the last place is known at the first.
    next_text = next_other = ""
    for at in [*order, *order][::-1]:
        text = problems[at].solution
        if text != next_text:
            next_text, next_other = text, next_text
        others[at] = next_other
    return [replace(problem, solution=others[at]) for at, problem in enumerate(problems)]


def about_visits(num_steps: int, batch_size: int, num_problems: int, what: str = "problems") -> list[str]:
    """Return a line about how often a run visits its problems, and a warning if a step visits a problem twice.

    ``batch_size``: data.global_batch_size; ``what``: what the data set holds, in the plural.
    """
    visits = num_steps * batch_size
    steps = "1 step" if num_steps == 1 else f"{num_steps:,} steps"
    lines = [
        f"{steps} x {batch_size:,} = {visits:,} visits to {num_problems:,} {what}: {visits / num_problems:,.1f} epochs"
    ]
    if batch_size > num_problems:
        lines.append(
            f"warning: data.global_batch_size ({batch_size:,}) is larger than the data ({num_problems:,} {what}): a "
            f"step visits each of them {batch_size / num_problems:,.1f} times; lower data.global_batch_size, or give "
            f"more {what}"
        )
    return lines


def _check_columns_exist(source: RecordSource, seen: set[str]) -> None:
    # An optional column that was renamed and is nowhere would otherwise be read as None in silence.
    for name, column in source.fields.items():
        if (name in FIELDS or source.teachers) and column not in (None, name, *seen):
            raise ValueError(
                f"{source.path}: data.fields.{name} names the column {column!r}, which no record has. "
                f"Columns found: {', '.join(sorted(seen))}."
            )


def _problem(
    record: Mapping[str, Any],
    location: str,
    columns: Mapping[str, str | None],
    places: Mapping[str, str],
    require_solution: bool,
    teachers: RecordTeachers | None,
) -> Problem:
    values = {name: record.get(column) if column is not None else None for name, column in columns.items()}
    problem, messages, tools, solution, answer, given_id = (values[name] for name in FIELDS)
    # `problem` goes first: many sets carry both, and their `messages` end in the reference reply.
    if problem is None and messages is not None:
        conversation = _conversation(messages, str(columns["messages"]))
    else:
        conversation, tools = ({"role": "user", "content": _text(problem, "problem", columns, record)},), None
    shares = {"": 1.0} if teachers is None else teachers.shares(record, location)
    required = require_solution and (teachers is None or teachers.read_solution(shares))
    wanted = columns["solution"] is not None and (required or solution is not None)
    solution = _text(solution, "solution", columns, record) if wanted else ""
    if answer is not None:
        answer = _short_text(answer, "answer", columns)
    if given_id is None:
        problem_id = _derived_id(conversation, solution, places)
    else:
        problem_id = _short_text(given_id, "id", columns)
        if problem_id in places:
            raise BadRecordError(f"field 'id': expected a new id, got {problem_id!r} as in {places[problem_id]}")
    of_several = tuple(shares.items()) if len(shares) > 1 else ()
    schemas = read_tools(tools, str(columns["tools"]))
    teacher = next(iter(shares))
    return Problem(problem_id, conversation, solution, answer, location, schemas, teacher=teacher, shares=of_several)


def _conversation(messages: object, column: str) -> tuple[dict[str, Any], ...]:
    messages = from_column(messages, column)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRecordError(f"field {column!r}: expected a non-empty list of messages", messages)
    conversation = tuple(read_message(message, place(column, index)) for index, message in enumerate(messages))
    roles = [message["role"] for message in conversation]
    if "user" not in roles or roles[-1] == "assistant":
        raise BadRecordError(
            f"field {column!r}: expected a user message and no reply at the end (a reply can be the solution), got the "
            f"roles {', '.join(roles)}"
        )
    return conversation


def _text(value: object, name: str, columns: Mapping[str, str | None], record: Mapping[str, Any]) -> str:
    if isinstance(value, str) and value.strip():
        return value
    found = ", ".join(map(str, record)) or "nothing"
    missing = f"no such field (the record has: {found}; data.fields.{name}=COLUMN names another column)"
    got = kind(value) if columns[name] in record else missing
    raise BadRecordError(f"field {columns[name] or name!r}: expected a non-empty text, got {got}", value)


def _short_text(value: object, name: str, columns: Mapping[str, str | None]) -> str:
    is_number = isinstance(value, float) and math.isfinite(value)
    is_number |= isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and value.strip()):
        return str(value)
    raise BadRecordError(f"field {columns[name]!r}: expected a non-empty text or a number, got {kind(value)}", value)


def _derived_id(conversation: Sequence[Mapping[str, Any]], solution: str, places: Mapping[str, str]) -> str:
    base = hashlib.sha256(_json([conversation, solution])).hexdigest()[:16]
    candidates = itertools.chain([base], (f"{base}-{repetition}" for repetition in itertools.count(1)))
    return next(problem_id for problem_id in candidates if problem_id not in places)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def are_one_hint(solutions: Sequence[str]) -> bool:
    """Return whether several problems have one hint, such as an instruction: no response can leak it."""
    return len(solutions) > 1 and bool(solutions[0]) and len(set(solutions)) == 1
