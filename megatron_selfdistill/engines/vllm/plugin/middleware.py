# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a server does with requests before vLLM sees them.

Every route but the health check needs the server's token, since vLLM's own ``--api-key`` leaves the routes open that
load weights and call methods.  The adapter that the trainer sends gets a name.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
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
