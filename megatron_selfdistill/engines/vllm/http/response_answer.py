# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The response in the answer of a vLLM server: its parts, or one message that says what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

from megatron_selfdistill.distributed.timed_http import HttpAnswer
from megatron_selfdistill.engines.vllm.engine_output import EngineOutput, EngineRequest, possible_output
from megatron_selfdistill.engines.vllm.http.stated_response import GENERATE, MEDIA_TYPE, NOT_STATED, StatedResponse
from megatron_selfdistill.errors import EngineError

ACCEPTED = f"{MEDIA_TYPE}, application/json;q=0.5"
"""The forms of a response that `response_in` reads, for the header Accept."""

_SHOWN_CHARS = 500
# The greatest length of an answer with a response: that of its fixed parts, and that of a token, which needs 200 bytes.
_FIXED_BYTES, _TOKEN_BYTES = 2**20, 2**10


class RequestRefused(EngineError):
    """The server refuses the request; another server would refuse it too."""


def max_bytes_of(request: EngineRequest) -> int:
    """Return the greatest length of an answer to ``request``."""
    return _FIXED_BYTES + _TOKEN_BYTES * int(request.sampling.get("max_tokens", 0))


def response_in(answer: HttpAnswer, request: EngineRequest, address: str, vocab_size: int) -> EngineOutput:
    """Return the output that an answer holds, in JSON or in the compact form.

    Raises: `EngineError` with ``address`` if a part of it is missing, wrong or impossible; `RequestRefused`.
    """
    _require_ok(answer, "POST", GENERATE, address)
    is_compact = answer.media_type == MEDIA_TYPE
    try:
        stated = StatedResponse.unpacked(answer.body) if is_compact else StatedResponse.of_json(json.loads(answer.text))
        return possible_output(
            request,
            vocab_size,
            f"the vLLM server {address}",
            token_ids=list(stated.token_ids),
            log_probs=list(stated.log_probs),
            finish_reason=stated.finish_reason,
            versions=stated.weight_versions,
        )
    except NOT_STATED as error:
        got = f"{len(answer.body)} bytes" if is_compact else shown(answer.text)
        raise EngineError(
            f"{address}: expected a response of the media type {answer.media_type}, got {got} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


def parsed(answer: HttpAnswer, method: str, path: str, address: str) -> Any:
    """Return the JSON of an answer, or None if it is empty; raise `EngineError` for a refusal, and for no JSON."""
    _require_ok(answer, method, path, address)
    text = answer.text
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{address}: {method} {path}: expected JSON, got {shown(text)}") from error


def shown(answer: Any) -> str:
    """Return the beginning of an answer, for a message."""
    try:
        text = answer if isinstance(answer, str) else json.dumps(answer)
    except RecursionError:
        text = "an answer that is nested too deeply"
    return text[:_SHOWN_CHARS] + ("..." if len(text) > _SHOWN_CHARS else "")


def _require_ok(answer: HttpAnswer, method: str, path: str, address: str) -> None:
    if answer.status != 200:
        kind = RequestRefused if 400 <= answer.status < 500 else EngineError
        raise kind(f"{address}: {method} {path} answered {answer.status}: {_reason(answer.text)}")


def _reason(text: str) -> str:
    """Return the message in an answer that reports an error, without the JSON around it."""
    try:
        return shown(str(json.loads(text)["error"]["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return shown(text)
