# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a vLLM engine states about a response, from vLLM's objects or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GENERATE = "/inference/v1/generate"
"""The path that generates a response."""

NOT_STATED = (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
"""What the functions of this module raise for an answer of another form."""


@dataclass(frozen=True)
class StatedResponse:
    """The parts of a response as an engine states them; nothing of them is checked but their form."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    """One log-prob per token, in nats."""
    finish_reason: str
    """vLLM's word for the end of the response."""
    weight_versions: Sequence[tuple[str, int, int]]
    """Version, first token and end of each span, as vLLM reports them."""

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


def _integer(value: Any) -> int:
    """Return ``value``; raise TypeError unless it is an integer, which a boolean and 1.0 are not."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _number_of(value: Any) -> float:
    """Return a number of JSON as a float; raise TypeError for anything else, and OverflowError if it is too large."""
    return value if type(value) is float else float(_integer(value))
