# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The middleware of a server: no route but one works without the token, and responses are compact on request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_vllm import answer_to

from megatron_selfdistill.engines.vllm.http.stated_response import GENERATE, MEDIA_TYPE, StatedResponse
from megatron_selfdistill.engines.vllm.plugin.middleware import CompactResponses, TokenRequired
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE

ACCEPTED = f"{MEDIA_TYPE}, application/json;q=0.5".encode()
ANSWER = answer_to({"token_ids": [4, 5], "sampling_params": {"max_tokens": 3}}, ("7", "8"))


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


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer secre")],
        [(b"authorization", b"Bearer secret2")],
        [(b"authorization", b"secret")],
        [(b"authorization", "Bearer sécret".encode())],
    ],
)
@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/models", "/health/", "//health", ""])
def test_without_the_token_the_application_is_not_reached(monkeypatch, headers, path):
    reached, sent = served(monkeypatch, http(path, *headers))
    assert not reached
    assert sent[0]["status"] == 401 and b"secret" not in sent[1]["body"]


def test_with_the_token_and_for_health_it_is(monkeypatch):
    assert served(monkeypatch, http("/update_weights", (b"authorization", b"Bearer secret"))) == (True, [])
    assert served(monkeypatch, http("/health")) == (True, [])
    assert served(monkeypatch, {"type": "lifespan"}) == (True, [])


def test_a_web_socket_needs_it_too(monkeypatch):
    reached, sent = served(monkeypatch, {"type": "websocket", "path": "/health", "headers": []})
    assert not reached and sent == [{"type": "websocket.close", "code": 1008}]


def test_an_empty_token_is_none(monkeypatch):
    with pytest.raises(ValueError, match=TOKEN_VARIABLE):
        served(monkeypatch, http("/v1/models", (b"authorization", b"Bearer ")), token="")


def answered(
    body: bytes,
    *,
    path: str = GENERATE,
    accept: bytes = ACCEPTED,
    status: int = 200,
    kind: bytes = b"application/json",
    pieces: int = 1,
) -> tuple[dict[bytes, bytes], bytes, list[Any]]:
    """Return headers, body and messages of the middleware's answer where the application's answer is ``body``."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", kind), (b"content-length", str(len(body)).encode()), (b"x-kept", b"1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        cuts = [len(body) * i // pieces for i in range(pieces + 1)]
        for i in range(pieces):
            await send({"type": "http.response.body", "body": body[cuts[i] : cuts[i + 1]], "more_body": i < pieces - 1})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"accept", accept)]}
    asyncio.run(CompactResponses(app)(scope, None, send))  # type: ignore[arg-type]
    headers = {name.lower(): value for name, value in sent[0]["headers"]}
    return headers, b"".join(message["body"] for message in sent[1:]), sent


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_response_becomes_compact_with_its_length_and_its_other_headers(pieces):
    headers, body, sent = answered(json.dumps(ANSWER).encode(), pieces=pieces)
    assert headers == {
        b"content-type": MEDIA_TYPE.encode(),
        b"content-length": str(len(body)).encode(),
        b"x-kept": b"1",
    }
    assert StatedResponse.unpacked(body) == StatedResponse.of_json(ANSWER) and len(sent) == 2


def changed(**choice: Any) -> dict[str, Any]:
    return {"choices": [{**ANSWER["choices"][0], **choice}]}


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        (ANSWER, {"accept": b"application/json"}),
        (ANSWER, {"path": "/v1/completions"}),
        (ANSWER, {"status": 400}),
        (ANSWER, {"kind": b"text/event-stream"}),
        (changed(logprobs=None), {}),
        (changed(token_ids=[9, 10]), {}),
        ("no response", {}),
    ],
)
def test_any_other_answer_stays_as_it_is(answer, options):
    written = json.dumps(answer).encode()
    headers, body, _ = answered(written, **options)
    assert body == written and headers[b"content-type"] == options.get("kind", b"application/json")
    assert headers[b"content-length"] == str(len(written)).encode()


def test_a_token_that_needs_more_than_32_bits_stays_in_json():
    content = [{"token_id": 2**40, "logprob": -0.5}]
    written = json.dumps(changed(token_ids=[2**40], logprobs={"content": content})).encode()
    assert answered(written)[1] == written
