# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a vLLM engine states about a response: from vLLM's objects or JSON, or from a compact form of 8 bytes a token.

The compact form is, in place of some 180 bytes a token in JSON:

    a line of JSON: {"finish_reason": "stop", "weight_versions": [["7", 0, 1400]], "num_tokens": 1400}
    num_tokens token ids, int32, little-endian
    num_tokens log-probs, float32, little-endian

A client that knows the form asks for it (``Accept``) and reads from ``Content-Type`` whether the server knows it too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GENERATE = "/inference/v1/generate"
"""The path that generates a response."""

MEDIA_TYPE = "application/vnd.megatron-selfdistill.response"
"""The media type of the compact form."""

NOT_STATED = (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, struct.error)
"""What the functions of this module raise for an answer of another form."""


@dataclass(frozen=True)
class StatedResponse:
    """The parts of a response as an engine states them; nothing of them is checked but their form."""

    token_ids: Sequence[int]
    """Token ids in the range of int32."""
    log_probs: Sequence[float]
    """One log-prob per token, in nats, which the form rounds to float32."""
    finish_reason: str
    """vLLM's word for the end of the response."""
    weight_versions: Sequence[tuple[str, int, int]]
    """Version, first token and end of each span, as vLLM reports them."""

    def packed(self) -> bytes:
        """Return the compact form.  Raises: `NOT_STATED` for a token id outside of int32."""
        count = len(self.token_ids)
        head = {
            "finish_reason": self.finish_reason,
            "weight_versions": [list(span) for span in self.weight_versions],
            "num_tokens": count,
        }
        numbers = struct.pack(f"<{count}i{count}f", *self.token_ids, *self.log_probs)
        return json.dumps(head).encode() + b"\n" + numbers

    @classmethod
    def of_json(cls, answer: Any) -> StatedResponse:
        """Return the response in ``answer``, vLLM's JSON.  Raises: `NOT_STATED`."""
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
            raise ValueError(
                f"expected tokens with a log-prob each, got {len(token_ids)} tokens and {len(log_probs)} log-probs"
                f"{' of other tokens' if len(token_ids) == len(log_probs) else ''}"
            )
        return cls(token_ids, log_probs, str(choice["finish_reason"]), spans)

    @classmethod
    def unpacked(cls, body: bytes) -> StatedResponse:
        """Return the response in ``body``, the compact form.  Raises: `NOT_STATED`."""
        end = body.index(b"\n")
        head: Any = json.loads(body[:end])
        count = _integer(head["num_tokens"])
        numbers = struct.unpack(f"<{count}i{count}f", memoryview(body)[end + 1 :])
        versions = [(str(version), _integer(start), _integer(end)) for version, start, end in head["weight_versions"]]
        return cls(list(numbers[:count]), list(numbers[count:]), str(head["finish_reason"]), versions)


def _integer(value: Any) -> int:
    """Return ``value``; raise TypeError unless it is an integer, which a boolean and 1.0 are not."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _number_of(value: Any) -> float:
    """Return a number of JSON as a float; raise TypeError for anything else, and OverflowError if it is too large."""
    return value if type(value) is float else float(_integer(value))
