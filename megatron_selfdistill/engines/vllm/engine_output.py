# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What an engine is asked and what it returns, and the check that a model can have generated it; without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_selfdistill.choices import FINISH_REASONS
from megatron_selfdistill.errors import EngineError, first_few

# The largest log-prob of a token that an engine may state, in nats: the rounding of a log-softmax in float32, whose
# logits may be some thousands.
_LOG_PROB_ROUNDING = 1e-3
_LEAST_LOG_PROB = -9999.0  # what a vLLM server states in place of NaN and of minus infinity


@dataclass(frozen=True)
class EngineRequest:
    """One sequence that an engine is to continue."""

    token_ids: list[int]
    """Token ids of the sequence so far."""
    sampling: Mapping[str, Any]
    """Arguments of vLLM's ``SamplingParams``."""


@dataclass(frozen=True)
class EngineOutput:
    """The tokens with which an engine has continued one sequence."""

    token_ids: list[int]
    """Token ids, including the stop token that ended the sequence, if one did."""
    log_probs: list[float]
    """Log softmax of the model's logits at temperature 1 before any processor, per token, in nats."""
    finish_reason: str
    """The reason for the end of the sequence: stop or length."""
    weight_version: int | None
    """Version of the oldest weights that generated a token, as the engine reports it; None before the first weights."""
    weight_spans: Sequence[tuple[int, int]] = ()
    """Version and number of tokens of each part, as in `Response`."""


def versions_of(
    reported: Iterable[tuple[str, int, int]], num_tokens: int, who: str
) -> tuple[int | None, list[tuple[int, int]]]:
    """Return the oldest of the weights that generated a response, and the spans of several versions.

    ``reported``: the version, the first token and the end of each span, as vLLM reports them.
    The oldest version is None if no version is reported, or where one of them is not a number; the spans are empty
    there, and where one version generated all tokens.
    Raises: `EngineError`, which begins with ``who``, where spans do not cover the ``num_tokens`` tokens once, in order.
    """
    reported = list(reported)
    places = [(start, end) for _, start, end in reported]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    if places and ([*starts, num_tokens] != [0, *ends] or any(start > end for start, end in places)):
        raise EngineError(
            f"{who} stated the versions of its weights for the tokens {_shown([f'{a} to {b}' for a, b in places])}, "
            f"expected spans that cover the {num_tokens} tokens of the response once, in order"
        )
    named = [(version, end - start) for version, start, end in reported if end > start]
    if not named or not all(version.isdecimal() for version, _ in named):
        return None, []
    spans = [(int(version), num_tokens) for version, num_tokens in named]
    return min(version for version, _ in spans), spans if len(spans) > 1 else []


def possible_output(
    request: EngineRequest,
    vocab_size: int,
    who: str,
    *,
    token_ids: list[int],
    log_probs: list[float],
    finish_reason: str,
    versions: Iterable[tuple[str, int, int]],
) -> EngineOutput:
    """Return what an engine has stated about ``request`` as its output, if a model can have generated it.

    ``vocab_size``: number of the model's tokens, without those that pad its output layer.  ``versions``: as for
    `versions_of`; the other arguments are the fields of `EngineOutput`.
    Raises: `EngineError`, which begins with ``who``, for an end that ``request`` does not allow, token ids outside of
    the vocabulary, log-probs that are not finite or above 0, and versions of other tokens.
    """
    output = EngineOutput(token_ids, log_probs, finish_reason, None)
    _require_end(output, request.sampling, who)
    strange = [token for token in token_ids if not 0 <= token < vocab_size]
    if strange:
        raise EngineError(
            f"{who} returned the token ids {_shown(strange)}, expected 0 to {vocab_size - 1}: is it an engine of this "
            "run's model and tokenizer?"
        )
    wrong = [value for value in log_probs if not _LEAST_LOG_PROB < value <= _LOG_PROB_ROUNDING]
    if wrong:
        raise EngineError(
            f"{who} returned the log-probs {_shown(wrong)}, expected numbers of at most 0, above {_LEAST_LOG_PROB:g} "
            "(a server writes this number for NaN): are its weights whole?"
        )
    version, spans = versions_of(versions, len(token_ids), who)
    return replace(output, weight_version=version, weight_spans=spans)


def _require_end(output: EngineOutput, sampling: Mapping[str, Any], who: str) -> None:
    """Raise `EngineError` unless a response has a length and an end that ``sampling`` allows."""
    token_ids, stops = output.token_ids, sampling.get("stop_token_ids")
    longest = sampling.get("max_tokens", len(token_ids))
    if output.finish_reason not in FINISH_REASONS:
        raise EngineError(f"{who} ended a response with {str(output.finish_reason)[:40]!r}, expected stop or length")
    if not 0 < len(token_ids) <= longest or len(output.log_probs) != len(token_ids):
        raise EngineError(
            f"{who} was to return 1 to {longest} tokens with a log-prob each, got {len(token_ids)} tokens and "
            f"{len(output.log_probs)} log-probs"
        )
    if output.finish_reason == "length" and len(token_ids) < longest:
        raise EngineError(
            f"{who} ended a response with reason length after {len(token_ids)} of {longest} tokens: its "
            "--max-model-len is too small"
        )
    if output.finish_reason == "stop" and stops and token_ids[-1] not in stops:
        raise EngineError(
            f"{who} ended a response with reason stop and the token {token_ids[-1]}, expected one of the request's "
            f"stop tokens: {_shown(stops)}"
        )


def _shown(values: Sequence[object]) -> str:
    return first_few([str(value)[:40] for value in values], ", ")
