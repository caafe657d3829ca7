# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole answers over HTTP, with a greatest length of the body; deadlines hold from the connection to the last byte.

    async with asyncio.timeout(seconds), new_client(url) as client:
        answer = await exchange(client, "POST", url, content, headers, max_bytes)

The timeout of a socket is the time between two bytes: an endpoint that sends a byte every second would never reach it.
A deadline of asyncio's covers everything: the host's name, the connection, the request, headers and body.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import httpx


class HttpError(OSError):
    """An exchange without a complete answer of the length that the caller takes.

    The message has the cause, and no header of the request.
    """


@dataclass(frozen=True)
class HttpAnswer:
    """A complete answer."""

    status: int
    """The status code."""
    text: str
    """The body as UTF-8, with U+FFFD for other bytes; the request asks for no compression."""


def new_client(url: str) -> httpx.AsyncClient:
    """Return a client of ``url``'s scheme that opens a connection for each request and has no deadlines of its own.

    It reads neither proxies nor passwords from the variables of the process.
    """
    secure: ssl.SSLContext | bool = ssl.create_default_context() if url.startswith("https:") else False
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(verify=secure, trust_env=False, timeout=None, limits=limits)


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    content: bytes | None,
    headers: Mapping[str, str | bytes],
    max_bytes: int,
) -> HttpAnswer:
    """Send a request and return its answer.

    Raises: `HttpError` without a complete answer, and for a body of more than ``max_bytes``.
    """
    sent = {"Accept-Encoding": "identity", **headers}
    try:
        async with client.stream(method, url, content=content, headers=sent) as answer:  # type: ignore[arg-type]
            body = bytearray()
            _require_short(int(answer.headers.get("Content-Length", 0)), max_bytes)
            async for piece in answer.aiter_raw():
                body += piece
                _require_short(len(body), max_bytes)
            return HttpAnswer(answer.status_code, body.decode(errors="replace"))
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise HttpError(_cause(error)) from None


def _require_short(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise HttpError(f"expected an answer of at most {max_bytes} bytes, got a longer one")


def _cause(error: BaseException) -> str:
    """Return the first cause of ``error``, without the headers that a refused request would show."""
    if isinstance(error, httpx.LocalProtocolError):
        return f"{type(error).__name__}: HTTP does not allow a header of the request; is there a line break in a token?"
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {error}"
