# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments, which reply to the model's responses, so that a problem becomes an episode of several turns."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.config.schema.field_checks import require_address, value_of_variable
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
        ...


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
        ...

    def step(self, response: str) -> Reply | Awaitable[Reply]:
        """Return the reply to the next response of the episode, which comes without its stop token."""
        ...

    def close(self) -> Awaitable[None] | None:
        """End the episode.  The process of the session ends afterwards, with all processes that it has started."""
        ...


@dataclass(frozen=True)
class SessionLimits:
    """The limits of a session."""

    seconds: float = 60.0
    """Seconds of one ``reset`` or ``step``."""
    memory_gb: float | None = 8.0
    """Gigabytes of private memory of a session's process, and of each process that it starts; None is no limit."""
    concurrency: int = 16
    """Number of sessions of a rank that work at the same time."""


_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 8.0
MAX_BYTES = 10_000_000
"""The greatest length of an answer."""
_SHOWN = 200  # characters of an unexpected answer


@dataclass(frozen=True)
class HttpEnvironment:
    """The environment that answers ``POST url/chat/completions``.  Any number of threads may call it.

    The request has ``messages`` (the messages of the problem, then each response as the assistant and each shown reply
    as the user), ``metadata`` (texts: ``problem_id``, ``turn`` from 0, and ``answer`` where the data have one) and
    ``model`` where it is set.

    The answer has the text of the reply in ``choices[0].message.content`` (null: none) and its role in
    ``choices[0].message.role``; the role "assistant", which every such endpoint sends, stands for "user".  Beside
    ``choices`` it may have ``reward``, ``feedback``, ``hint`` and ``done``; a missing field has the default of `Reply`.
    """

    url: str
    """The address, without /chat/completions."""
    model: str | None = None
    """The name of the model in the request."""
    api_key_env: str | None = None
    """The name of the environment variable with the bearer token of the request."""
    timeout_s: float = 60.0
    """Seconds after which an attempt without a complete answer counts as failed."""
    retries: int = 3
    """Number of further attempts after one without an answer, or with the status 429 or one of 500 and above."""
    concurrency: int = 16
    """Number of requests that a rank sends at the same time."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an address that no request could have."""
        require_address("environment.options.url", self.url, "http://host:8000/v1")

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        """Return the endpoint's reply to the last response.

        Raises: RuntimeError where no attempt gets an answer; ValueError for an answer of another form, or of more than
        MAX_BYTES.  Each message has the address.
        """
        answer = self._answer(self._request(problem, said))
        try:
            return _reply(json.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"environment.options.url={self.url}: expected an answer with choices[0].message in JSON, got "
                f"{answer[:_SHOWN]!r} ({type(error).__name__}: {error})"
            ) from error

    def _request(self, problem: Problem, said: Sequence[str]) -> dict[str, Any]:
        spoken = [{"role": "user" if i % 2 else "assistant", "content": text} for i, text in enumerate(said)]
        metadata = {"problem_id": problem.id, "turn": str(len(said) // 2)}
        if problem.answer is not None:
            metadata["answer"] = problem.answer
        named = {} if self.model is None else {"model": self.model}
        return {**named, "messages": [*problem.messages, *spoken], "metadata": metadata}

    def _answer(self, request: dict[str, Any]) -> str:
        """Return the body of the first answer with status 200."""
        payload = json.dumps(request)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS))
            try:
                address = f"{self.url.rstrip('/')}/chat/completions"
                status, text = _posted(address, payload, self.api_key_env, self.timeout_s)
            except OSError as error:  # no connection, or no answer in time
                failure = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return text
            failure = f"status {status}: {text[:_SHOWN]!r}"
            if status != 429 and status < 500:
                raise RuntimeError(
                    f"environment.options.url={self.url}: expected an answer with status 200, got {failure}"
                )
        raise RuntimeError(
            f"environment.options.url={self.url}: expected an answer within {self.timeout_s:g} s, got none; "
            f"attempts: {self.retries + 1}, the last: {failure}"
        )


class HttpSessions:
    """The environment with a state behind ``POST url/reset``, ``url/step`` and ``url/close``.

    ``reset`` sends ``problem_id``, ``messages``, ``answer`` and ``seed`` and gets ``session``, a name, ``text`` and, if
    the first turn has one, ``hint``.
    ``step`` sends ``session`` and ``response`` and gets the fields of `Reply`; ``close`` sends ``session``.  No request
    is repeated, since the server may have taken a step whose answer got lost.
    """

    def __init__(self, url: str, api_key_env: str | None = None) -> None:
        """``url``: the address before /reset.  ``api_key_env``: the variable with the token.  Raises: `ConfigError`."""
        require_address("environment.options.url", url, "http://host:8000")
        self.url, self.api_key_env = url.rstrip("/"), api_key_env
        self._session: Any = None

    def reset(self, problem: Problem, seed: int) -> Reply:
        """Begin a session of the server and return the text and the hint that it shows.  Raises: as `step`."""
        named = {"problem_id": problem.id, "messages": list(problem.messages), "answer": problem.answer, "seed": seed}
        answer = self._answer("reset", named)
        self._session = answer["session"]
        return Reply(answer.get("text"), hint=answer.get("hint"), done=False)

    def step(self, response: str) -> Reply:
        """Return the server's reply.  Raises: RuntimeError for another status than 200; ValueError for another form."""
        return Reply(**self._answer("step", {"session": self._session, "response": response}))

    def close(self) -> None:
        """End the session of the server."""
        self._answer("close", {"session": self._session})

    def _answer(self, call: str, request: dict[str, Any]) -> dict[str, Any]:
        status, text = _posted(f"{self.url}/{call}", json.dumps(request), self.api_key_env, timeout_s=None)
        if status != 200:
            raise RuntimeError(f"{self.url}/{call}: expected the status 200, got {status}: {text[:_SHOWN]!r}")
        found: dict[str, Any] = json.loads(text)
        return found


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


BUILT_IN: dict[str, Callable[..., Environment | SessionEnvironment]] = {
    "http": HttpEnvironment,
    "http_sessions": HttpSessions,
    "tools": ToolEnvironment,
}
"""Name of an environment that needs no dotted path -> its class."""


def has_sessions(make: Callable[..., Any]) -> bool:
    """Return whether ``make`` is a class with ``reset``, ``step`` and ``close``, and without ``reply``."""
    named, methods = inspect.unwrap(make), ("reply", "reset", "step", "close")
    return [name for name in methods if callable(getattr(named, name, None))] == ["reset", "step", "close"]


def _posted(url: str, payload: str, api_key_env: str | None, timeout_s: float | None) -> tuple[int, str]:
    from megatron_selfdistill.distributed.timed_http import post

    headers = {"Content-Type": "application/json"}
    api_key = value_of_variable("environment.options.api_key_env", api_key_env)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    answer = post(url, payload, headers, timeout_s, MAX_BYTES)
    return answer.status, answer.text


def _reply(answer: Any) -> Reply:
    message = answer["choices"][0]["message"]
    text, role = message.get("content"), message.get("role", "user")
    given = {name: answer[name] for name in ("reward", "feedback", "hint", "done") if name in answer}
    return Reply(text, "user" if role == "assistant" else role, **given)
