# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The responses of a server in the compact form of http/stated_response.py, for the clients that ask for it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_selfdistill.rollout.vllm.http.stated_response import GENERATE, MEDIA_TYPE, NOT_STATED, StatedResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class CompactResponses:
    """ASGI middleware (``--middleware``) that answers a request for a response in the form that the client accepts.

    Whatever is not a whole response in vLLM's JSON stays as it is: refusals, streams, log-probs of prompts.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass every request on, and replace the answers that have a compact form."""
        asked = scope["type"] == "http" and scope["path"] == GENERATE
        if asked and MEDIA_TYPE.encode() in dict(scope["headers"]).get(b"accept", b""):
            await self._app(scope, receive, _Replacing(send).send)
        else:
            await self._app(scope, receive, send)


class _Replacing:
    """An answer that is held back until it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Send, hold back or replace a message of the application."""
        if message["type"] == "http.response.start" and _is_json(message):
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole(self._start)
        else:
            await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        body, headers = bytes(self._body), list(start["headers"])
        compact = compact_body(body)
        if compact is not None:
            body = compact
            replaced = {b"content-type": MEDIA_TYPE.encode(), b"content-length": str(len(body)).encode()}
            headers = [(name, value) for name, value in headers if name.lower() not in replaced]
            headers += replaced.items()
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def compact_body(body: bytes) -> bytes | None:
    """Return vLLM's JSON of a response in the compact form, or None if it has parts that the form does not have."""
    try:
        answer = json.loads(body)
        return None if answer.get("prompt_logprobs") else StatedResponse.of_json(answer).packed()
    except (*NOT_STATED, AttributeError):
        return None  # the client reads the JSON, and says what is wrong with it


def _is_json(start: Message) -> bool:
    kind = {name.lower(): value for name, value in start["headers"]}.get(b"content-type", b"")
    return bool(start["status"] == 200 and kind.startswith(b"application/json"))
