# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Messages in the style of OpenAI, as problems and chat logs have them, in the form that chat templates read.

A content of text parts becomes one text, the arguments of tool calls become objects, and keys without a value go.
Errors name places and kinds of values; the value itself is apart, since not everybody may see it.
"""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.data.records import from_json, kind
from megatron_selfdistill.errors import BadRecordError


def read_message(message: object, where: str) -> dict[str, Any]:
    """Return a message with its content as one text, if it has a content, and the arguments of its calls as objects.

    ``where``: the place of the message, for errors.  Raises: `BadRecordError`.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        got = f"the role {kind(message.get('role'))}" if isinstance(message, dict) else kind(message)
        raise BadRecordError(f"{where}: expected an object with 'role' and 'content', got {got}", message)
    # Columnar files have null for missing keys; chat templates ask whether a key is present.
    kept = {key: value for key, value in message.items() if value is not None}
    calls = kept.pop("tool_calls", None)
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise BadRecordError(f"{where}: expected a list of tool calls, got {kind(calls)}", calls)
    if calls:
        kept["tool_calls"] = [_tool_call(call, where) for call in calls]
    if "content" in kept:
        kept["content"] = _text(kept["content"], where)
    elif not calls:
        raise BadRecordError(f"{where}: expected a text as 'content', got nothing", message)
    return kept


def _text(content: object, where: str) -> str:
    """Return a content as one string; the texts of several parts are joined by line feeds, as servers join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise BadRecordError(f"{where}: expected a string or text parts as the content, got {kind(content)}")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecordError(f"{where}: expected text parts only, got another kind of part", part)
        parts.append(part["text"])
    return "\n".join(parts)


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """Return the tool call with its arguments as an object, the form that servers pass to chat templates.

    Many templates would encode arguments that are JSON text as a string once more.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError(f"{where}: expected tool calls with a function's name and arguments, got another", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments) if arguments.strip() else {}
        except ValueError:
            raise BadRecordError(
                f"{where}: expected a tool call's arguments to be valid JSON, got other text", call
            ) from None
    kept = {key: value for key, value in call.items() if value is not None}
    return kept | {"function": {"name": function["name"], "arguments": _without_nulls(arguments)}}


def _without_nulls(value: Any) -> Any:
    # Parquet files give every call the arguments of all calls, as nulls.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return {} if value is None else value


def read_tools(value: object, column: str) -> tuple[dict[str, Any], ...]:
    """Return the schemas of functions in ``column``, a list or its JSON as text; () for null."""
    value = from_column(value, column)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, dict) for tool in value):
        raise BadRecordError(f"field {column!r}: expected a list of objects, got {kind(value)}")
    return tuple(_without_nulls(tool) for tool in value)


def from_column(value: object, column: str) -> object:
    """Return the value of a column whose JSON may stand there as text."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except ValueError:
        raise BadRecordError(f"field {column!r}: expected a list, got a text that is not its JSON", value) from None


def place(column: str, index: int) -> str:
    """Return the place of a message for errors."""
    return f"field '{column}[{index}]'"
