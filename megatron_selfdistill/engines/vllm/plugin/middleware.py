# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a server does with requests before vLLM sees them, and with vLLM's answers.

Every route but the health check needs the server's token, since vLLM's own ``--api-key`` leaves the routes open that
load weights and call methods.  The adapter that the trainer sends gets a name.  A client that asks for it gets
responses in the compact form of http/stated_response.py.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
from megatron_selfdistill.engines.vllm.http.stated_response import GENERATE, MEDIA_TYPE, NOT_STATED, StatedResponse
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE

_OPEN_PATHS = ("/health",)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TokenRequired:
    """ASGI middleware (``--middleware``) that answers 401 without ``Authorization: Bearer TOKEN``.

    The token is the environment variable SELFDISTILL_SERVER_TOKEN at construction; ValueError where it is empty.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise ValueError(f"expected a token in the environment variable {TOKEN_VARIABLE}, got nothing")
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request with the token on to the server, and answer any other request with 401."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in _OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "this server needs Authorization: Bearer TOKEN"}'
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})


class AdapterNamed:
    """ASGI middleware (``--middleware``) by which requests can name the adapter that the trainer sends.

    vLLM knows adapters by their files alone, which it would read at the start.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass every request on, the first one after the name is known."""
        models = getattr(scope["app"].state, "openai_serving_models", None) if "app" in scope else None
        if models is not None and ADAPTER_NAME not in models.lora_requests:
            from vllm.lora.request import LoRARequest

            models.lora_requests[ADAPTER_NAME] = LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH)
        await self._app(scope, receive, send)


class CompactResponses:
    """ASGI middleware (``--middleware``) that answers a request for a response in the form that the client accepts.

    Whatever is not a whole response in vLLM's JSON stays as it is: refusals and streams.
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
        return StatedResponse.of_json(json.loads(body)).packed()
    except NOT_STATED:
        return None  # the client reads the JSON, and says what is wrong with it


def _is_json(start: Message) -> bool:
    kind = {name.lower(): value for name, value in start["headers"]}.get(b"content-type", b"")
    return bool(start["status"] == 200 and kind.startswith(b"application/json"))
