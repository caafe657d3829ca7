# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Calls of tools: the class that has the tools, their schemas, and how the models of each family write a call."""

from __future__ import annotations

import inspect
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, get_args, get_type_hints

from megatron_selfdistill.config.functions import imported
from megatron_selfdistill.errors import ConfigError

_SHOWN = 200  # characters of a call that cannot be read


class ToolCallError(ValueError):
    """A call that cannot be read or made; the model reads the message."""


@dataclass(frozen=True)
class ToolCall:
    """A call of the tool ``name``."""

    name: str
    arguments: dict[str, Any]
    """The arguments by name.  An argument whose format has no types is a text."""


Parser = Callable[[str], list[ToolCall]]
"""A function that returns the calls in a response, or none for an answer.  It raises `ToolCallError`."""


def hermes(response: str) -> list[ToolCall]:
    """Return the calls in the format of Hermes and Qwen: <tool_call>{"name": .., "arguments": {..}}</tool_call>."""
    return [_call(_read(block), block, ("arguments",)) for block in _blocks(response)]


def llama(response: str) -> list[ToolCall]:
    """Return the calls in the format of Llama 3: a response that is one object {"name": .., "parameters": {..}}.

    Several objects are separated by semicolons.  <|python_tag|> may stand before them.
    """
    text = response.strip().removeprefix("<|python_tag|>").strip()
    calls: list[ToolCall] = []
    place = 0
    while text.startswith("{", place):
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            value, end = None, len(text)
        calls.append(_call(value, text[place:end], ("parameters", "arguments")))
        place = _behind(text, end, "; \n")
    if calls and place < len(text):
        raise ToolCallError(f"expected nothing after the tool calls, got {text[place : place + _SHOWN]!r}")
    return calls


def glm(response: str) -> list[ToolCall]:
    """Return the calls in the format of GLM 4.5: <tool_call>NAME, then pairs of <arg_key> and <arg_value>.

    All arguments are texts, since the format writes a text and a number alike.
    """
    calls = []
    for block in _blocks(response):
        place = block.find("<arg_key>") if "<arg_key>" in block else len(block)
        call = ToolCall(block[:place].strip(), {})
        while call.name and place < len(block):
            key, place = _tagged(block, place, "arg_key")
            call.arguments[key.strip()], place = _tagged(block, place, "arg_value")
        if not call.name:
            raise _not_glm(block)
        calls.append(call)
    return calls


def _tagged(block: str, start: int, tag: str) -> tuple[str, int]:
    """Return the text in the ``tag`` at ``start``, and the place of what follows it but white space.

    A model writes the block, so that reading it takes a time proportional to its length, whatever it is.
    """
    end = block.find(f"</{tag}>", start)
    if end < 0 or not block.startswith(f"<{tag}>", start):
        raise _not_glm(block)
    return block[start + len(tag) + 2 : end], _behind(block, end + len(tag) + 3, string.whitespace)


def _behind(text: str, start: int, characters: str) -> int:
    """Return the first place from ``start`` on where none of the ``characters`` stands."""
    while start < len(text) and text[start] in characters:
        start += 1
    return start


def _not_glm(block: str) -> ToolCallError:
    return ToolCallError(
        f"expected a name and pairs of <arg_key> and <arg_value> in <tool_call>, got {block[:_SHOWN]!r}"
    )


PARSERS: dict[str, Parser] = {"hermes": hermes, "llama": llama, "glm": glm}
"""Name of a parser that needs no dotted path -> its function."""


def typed(call: ToolCall, tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``call`` for ``tool``.

    A text for a parameter whose annotation takes no text is read as JSON where it is JSON: "3" for an ``int`` is 3.

    Raises: `ToolCallError` for an argument that is missing, and for one that the tool does not have.
    """
    hints = get_type_hints(tool)
    texts = {name for name in call.arguments if str in (hint := hints.get(name, str), *get_args(hint))}
    arguments = {name: value if name in texts else _read(value) for name, value in call.arguments.items()}
    try:
        inspect.signature(tool).bind(**arguments)
    except TypeError as error:
        raise ToolCallError(f"{call.name}: {error}") from error
    return arguments


def tool_class(path: str) -> type:
    """Return the class with the dotted path ``path``, whose public methods are the tools.

    Raises: `ConfigError` if there is no such class, or if it has no method ``reward``.
    """
    key = "environment.options.tools"
    kind = imported(key, path, "class")
    if not isinstance(kind, type) or not callable(getattr(kind, "reward", None)):
        raise ConfigError(f"{key}={path}: expected a class with a method reward(response), which rewards an answer")
    return kind


def tools_of(kind: type) -> dict[str, Callable[..., Any]]:
    """Return the tools of a class by their names: its public methods but reset, reward and close."""
    methods, others = inspect.getmembers(kind, inspect.isfunction), ("reset", "reward", "close")
    return {name: method for name, method in methods if not name.startswith("_") and name not in others}


def schemas_of(path: str) -> list[dict[str, Any]]:
    """Return the schema of each tool of the class ``path``, for chat templates: from annotations and docstring."""
    from transformers.utils import get_json_schema  # slow, and only a run with tools needs it

    kind = tool_class(path)
    return [get_json_schema(MethodType(tool, kind)) for tool in tools_of(kind).values()]  # bound: self is no argument


def _blocks(response: str) -> list[str]:
    *closed, rest = response.split("</tool_call>")
    if "<tool_call>" in rest or not all("<tool_call>" in part for part in closed):
        raise ToolCallError("expected </tool_call> after each <tool_call>")
    return [part.partition("<tool_call>")[2] for part in closed]


def _call(value: Any, text: str, names: tuple[str, ...]) -> ToolCall:
    """Return the call that ``value``, the JSON of ``text``, describes, whose arguments have one of the ``names``."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        [*given] = [value[name] for name in names if name in value]
        if not given or (len(given) == 1 and isinstance(given[0], dict)):
            return ToolCall(value["name"], given[0] if given else {})
    raise ToolCallError(f'expected {{"name": .., "{names[0]}": {{..}}}} in JSON, got {text.strip()[:_SHOWN]!r}')


def _read(value: Any) -> Any:
    """Return the value of a text in JSON; any other text and any other value as it is."""
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value
