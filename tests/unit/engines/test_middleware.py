# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The middleware of a server: no route but one works without the token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_selfdistill.engines.vllm.plugin.middleware import TokenRequired
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE


def served(monkeypatch, scope: dict[str, Any], token: str = "secret") -> tuple[bool, list[dict[str, Any]]]:
    """Return whether the application was reached, and the answer if it was not reached."""
    reached: list[bool] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(True)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    monkeypatch.setenv(TOKEN_VARIABLE, token)
    asyncio.run(TokenRequired(app)(scope, receive, send))
    return bool(reached), sent


def http(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "path": path, "headers": list(headers)}


@pytest.mark.parametrize("header", [None, b"", b"Bearer secre", b"Bearer secret2", b"secret", "Bearer sécret".encode()])
@pytest.mark.parametrize("path", ["/collective_rpc", "/health/", "//health", ""])
def test_without_the_token_the_application_is_not_reached(monkeypatch, header, path):
    reached, sent = served(monkeypatch, http(path, *([] if header is None else [(b"authorization", header)])))
    assert not reached
    assert sent[0]["status"] == 401 and b"secret" not in sent[1]["body"]


def test_with_the_token_and_for_health_it_is_and_a_web_socket_or_an_empty_token_never(monkeypatch):
    for scope in (http("/load", (b"authorization", b"Bearer secret")), http("/health"), {"type": "lifespan"}):
        assert served(monkeypatch, scope) == (True, [])
    socket = served(monkeypatch, {"type": "websocket", "path": "/health", "headers": []})
    assert socket == (False, [{"type": "websocket.close", "code": 1008}])
    with pytest.raises(ValueError, match=TOKEN_VARIABLE):
        served(monkeypatch, http("/v1/models", (b"authorization", b"Bearer ")), token="")
