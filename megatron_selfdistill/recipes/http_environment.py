# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment behind an address: an endpoint for chat completions in the style of OpenAI that plays it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.recipes.environments import Reply
from megatron_selfdistill.timed_http import HttpError, post

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
    ``choices`` it may have ``reward``, ``feedback`` and ``done``; a field that is missing has the default of `Reply`.
    """

    url: str
    """The address, without /chat/completions."""
    model: str | None = None
    """The name of the model in the request."""
    api_key: str | None = field(default=None, repr=False)
    """The bearer token of the request."""
    timeout_s: float = 60.0
    """Seconds after which an attempt without a complete answer counts as failed."""
    retries: int = 3
    """Number of further attempts after one without an answer, or with the status 429 or one of 500 and above."""

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        """Return the endpoint's reply to the last response.

        Raises: RuntimeError where no attempt gets an answer; ValueError for an answer of another form, or of more than
        MAX_BYTES.  Each message has the address.
        """
        try:
            return _reply(self._answer(self._request(problem, said)))
        except ValueError as error:
            raise ValueError(f"environment.url={self.url}: {error}") from error

    def _request(self, problem: Problem, said: Sequence[str]) -> dict[str, Any]:
        spoken = [{"role": "user" if i % 2 else "assistant", "content": text} for i, text in enumerate(said)]
        metadata = {"problem_id": problem.id, "turn": str(len(said) // 2)}
        if problem.answer is not None:
            metadata["answer"] = problem.answer
        named = {} if self.model is None else {"model": self.model}
        return {**named, "messages": [*problem.messages, *spoken], "metadata": metadata}

    def _answer(self, request: dict[str, Any]) -> Any:
        """Return the parsed body of the first answer with status 200."""
        payload = json.dumps(request)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS))
            try:
                status, text = self._post(payload)
            except TimeoutError as error:
                failure = f"TimeoutError: {error}"
                continue
            except HttpError as error:
                failure = str(error)
                continue
            if status == 200:
                return _parsed(text)
            failure = f"status {status}: {text[:_SHOWN]!r}"
            if status != 429 and status < 500:
                raise RuntimeError(f"environment.url={self.url}: expected an answer with status 200, got {failure}")
        attempts = "1 attempt" if self.retries == 0 else f"{self.retries + 1} attempts"
        raise RuntimeError(
            f"environment.url={self.url}: expected an answer within {self.timeout_s:g} s, got none in {attempts}; "
            f"the last: {failure}"
        )

    def _post(self, payload: str) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        answer = post(f"{self.url.rstrip('/')}/chat/completions", payload, headers, self.timeout_s, MAX_BYTES)
        return answer.status, answer.text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"expected an answer in JSON, got {text[:_SHOWN]!r}") from None


def _reply(answer: Any) -> Reply:
    """Return the reply in the body of an answer.  Raises: ValueError, with the field, for another form."""
    try:
        message = answer["choices"][0]["message"]
        text, role = message.get("content"), message.get("role", "user")
        given = {name: answer[name] for name in ("reward", "feedback", "done") if name in answer}
    except (KeyError, IndexError, TypeError, AttributeError):
        shown = json.dumps(answer)[:_SHOWN]
        raise ValueError(f"expected an answer with choices[0].message, got {shown}") from None
    return Reply(text, "user" if role == "assistant" else role, **given)
