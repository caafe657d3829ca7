# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments, which reply to the model's responses, so that a problem becomes an episode of several turns."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.environments.tool_calls import (
    PARSERS,
    Parser,
    ToolCall,
    ToolCallError,
    tool_class,
    tools_of,
    typed,
)


class Environment(Protocol):
    """The protocol of environments: functions of the problem and of everything that was said, without a state."""

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        """Return the reply to the last response.

        ``problem``: the problem as the data have it.  ``said``: the texts of the episode after the problem, responses
        and shown replies by turns; the last one is the response to reply to, without its stop token.
        Any rank may call it, also in threads, and a call may be repeated: equal arguments must give equal replies.
        """


class SessionEnvironment(Protocol):
    """The protocol of environments with a state: each episode has a session, an object and a process of its own.

    The object is made once per rank, and each session works on a copy of it.  Any method may be a coroutine.  A method
    that raises, or that takes longer than ``environment.limits.seconds``, ends its episode.
    """

    def reset(self, problem: Problem, seed: int) -> str | Reply | Awaitable[str | Reply | None] | None:
        """Begin the episode and return the text that follows the problem's last message, without a separator, or None.

        A `Reply` in place of the text may also have a hint for the first turn; its other fields do not count.

        ``seed``: the number from which every random choice of the session must come; it is a function of the run's
        seed, the step, the problem and the sample.
        """

    def step(self, response: str) -> Reply | Awaitable[Reply]:
        """Return the reply to the next response of the episode, which comes without its stop token."""

    def close(self) -> Awaitable[None] | None:
        """End the episode.  The process of the session ends afterwards, with all processes that it has started."""


@dataclass(frozen=True)
class SessionLimits:
    """The limits of a session."""

    seconds: float = 60.0
    """Seconds of one ``reset`` or ``step``."""
    memory_gb: float | None = 8.0
    """Gigabytes of private memory of a session's process, and of each process that it starts; None is no limit."""
    concurrency: int = 16
    """Number of sessions of a rank that work at the same time."""


class ToolEnvironment:
    """The environment with a state whose replies are the answers of tools, the methods of a class.

    A response that calls tools gets their answers, one line each, and the episode goes on.  A call that cannot be read
    or made, and a tool that raises, answer with "Error: " and the reason.  A response without a call ends the episode:
    ``reward(response)`` of the class is its reward.  What a response writes within its thoughts is no call.
    """

    def __init__(self, tools: str, parser: str = "hermes", options: Mapping[str, Any] | None = None) -> None:
        """``tools``: the dotted path of the class, which each episode makes with the keyword arguments ``options``.

        ``parser``: hermes, llama, glm, or the dotted path of a `tool_calls.Parser`.  Raises: `ConfigError`.
        """
        self._kind, self._options = tool_class(tools), dict(options or {})
        self._parse: Parser = function_named("environment.options.parser", parser, PARSERS)
        self._named = tools_of(self._kind)

    def reset(self, problem: Problem, seed: int) -> Any:
        """Make the object with the tools; return the result of its method ``reset``, if it has one."""
        self._tools: Any = self._kind(**self._options)
        return self._tools.reset(problem, seed) if hasattr(self._tools, "reset") else None

    async def step(self, response: str) -> Reply:
        """Return the answers of the tools that the response calls, or the reward of its answer."""
        try:
            calls = self._parse(final_part(response).strip())
        except ToolCallError as error:
            return Reply(_said(error), role="tool", done=False)
        if not calls:
            return Reply(reward=await _awaited(self._tools.reward(response)))
        return Reply("\n".join([await self._answer(call) for call in calls]), role="tool", done=False)

    def close(self) -> Any:
        """Call ``close`` of the object with the tools, if it has one."""
        return self._tools.close() if hasattr(self._tools, "close") else None

    async def _answer(self, call: ToolCall) -> str:
        try:
            if call.name not in self._named:
                raise ToolCallError(f"there is no tool {call.name!r}: the tools are {', '.join(self._named)}")
            tool = getattr(self._tools, call.name)
            result = await _awaited(tool(**typed(call, tool)))
            text = result if isinstance(result, str) else json.dumps(result)
            text.encode()  # half of a surrogate pair, which a model can write, is no text
            return text
        except (Exception, SystemExit) as error:  # a tool can raise any exception, which the model may learn from
            return _said(error)


def _said(error: BaseException) -> str:
    """Return what the model reads about ``error``, with halves of surrogate pairs as escapes."""
    name = "" if isinstance(error, ToolCallError) else f"{type(error).__name__}: "
    return f"Error: {name}{error}".encode(errors="backslashreplace").decode()


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


BUILT_IN: dict[str, Callable[..., Environment | SessionEnvironment]] = {"tools": ToolEnvironment}
"""Name of an environment that needs no dotted path -> its class."""


def has_sessions(make: Callable[..., Any]) -> bool:
    """Return whether ``make`` is a class with ``reset``, ``step`` and ``close``, and without ``reply``."""
    named, methods = inspect.unwrap(make), ("reply", "reset", "step", "close")
    return [name for name in methods if callable(getattr(named, name, None))] == ["reset", "step", "close"]
