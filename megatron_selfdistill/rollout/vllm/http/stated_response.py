# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a vLLM server states about a response: read from vLLM's JSON, or from a compact form of 8 bytes a token.

The compact form is, in place of some 180 bytes a token in JSON:

    a line of JSON: {"finish_reason": "stop", "weight_versions": [["7", 0, 1400]], "num_tokens": 1400}
    num_tokens token ids, int32, little-endian
    num_tokens log-probs, float32, little-endian

A client that knows the form asks for it (``Accept``) and reads from ``Content-Type`` whether the server knows it too.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GENERATE = "/inference/v1/generate"
"""The path that generates a response."""

MEDIA_TYPE = "application/vnd.megatron-selfdistill.response"
"""The media type of the compact form."""

_BYTES = 4


NOT_STATED = (LookupError, TypeError, ValueError, OverflowError, RecursionError)
"""What the functions of this module raise for an answer of another form."""


class OtherTokensError(ValueError):
    """An answer whose log-probs are those of other tokens than the response's."""


@dataclass(frozen=True)
class StatedResponse:
    """The parts of a response as a server states them; nothing of them is checked but their form."""

    token_ids: Sequence[int]
    """Token ids in the range of int32."""
    log_probs: Sequence[float]
    """One log-prob per token, in nats, which the form rounds to float32."""
    finish_reason: str
    """vLLM's word for the end of the response."""
    weight_versions: Sequence[tuple[str, int, int]]
    """Version, first token and end of each span, as vLLM reports them."""

    def packed(self) -> bytes:
        """Return the compact form.  Raises: OverflowError for a token id outside of int32."""
        head = {
            "finish_reason": self.finish_reason,
            "weight_versions": [list(span) for span in self.weight_versions],
            "num_tokens": len(self.token_ids),
        }
        return json.dumps(head).encode() + b"\n" + token_bytes(self.token_ids) + log_prob_bytes(self.log_probs)

    @classmethod
    def of_json(cls, answer: Any) -> StatedResponse:
        """Return the response in ``answer``, vLLM's JSON.  Raises: `NOT_STATED`, among it `OtherTokensError`."""
        [choice] = answer["choices"]
        token_ids = [_integer(token) for token in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        logged = [_integer(token["token_id"]) for token in content]
        log_probs = [_number_of(token["logprob"]) for token in content]
        spans = [
            (str(span["version"]), _integer(span["start"]), _integer(span["end"]))
            for span in choice["weight_versions"] or []
        ]
        if logged != token_ids:
            raise OtherTokensError(
                f"expected tokens with a log-prob each, got {len(token_ids)} tokens and {len(log_probs)} log-probs"
                f"{' of other tokens' if len(token_ids) == len(log_probs) else ''}"
            )
        return cls(token_ids, log_probs, str(choice["finish_reason"]), spans)

    @classmethod
    def unpacked(cls, body: bytes) -> StatedResponse:
        """Return the response in ``body``, the compact form.  Raises: `NOT_STATED`."""
        end = body.index(b"\n")
        head: Any = json.loads(body[:end])
        count = head["num_tokens"]
        if type(count) is not int or len(body) - end - 1 != 2 * _BYTES * count:
            raise ValueError(f"expected 8 bytes for each of {count} tokens, got {len(body) - end - 1} bytes")
        numbers = memoryview(body)[end + 1 :]
        tokens, log_probs = tokens_of(numbers[: _BYTES * count]), log_probs_of(numbers[_BYTES * count :])
        versions = [(str(version), _integer(start), _integer(end)) for version, start, end in head["weight_versions"]]
        return cls(tokens, log_probs, str(head["finish_reason"]), versions)


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Return token ids as int32, little-endian."""
    return _little_endian(array("i", tokens))


def log_prob_bytes(log_probs: Sequence[float]) -> bytes:
    """Return log-probs as float32, little-endian."""
    return _little_endian(array("f", log_probs))


def tokens_of(data: bytes | memoryview) -> list[int]:
    """Return the token ids of `token_bytes`."""
    return _read(array("i"), data).tolist()


def log_probs_of(data: bytes | memoryview) -> list[float]:
    """Return the log-probs of `log_prob_bytes`."""
    return _read(array("f"), data).tolist()


def _little_endian(numbers: array[Any]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _read(numbers: array[Any], data: bytes | memoryview) -> array[Any]:
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _integer(value: Any) -> int:
    """Return ``value``; raise TypeError unless it is an integer, which a boolean and 1.0 are not."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _number_of(value: Any) -> float:
    """Return a number of JSON as a float; raise TypeError for anything else, and OverflowError if it is too large."""
    return value if type(value) is float else float(_integer(value))
