# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests and responses as arrays of numbers, as they travel between ranks (`distributed.collectives`).

Tokens travel as int32, log-probs as float32, which is what an
engine computes, and counts as small integers.  A response takes 8 bytes per token.  A prompt travels once, however many
requests have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_selfdistill.distributed.parcels import cut
from megatron_selfdistill.rollout.base import FINISH_REASONS, Request, Response

NUM_RESPONSE_ARRAYS = 8
"""The number of arrays of `response_arrays`, unless the list is empty."""

_NONE = -1  # in place of a version that does not exist
# What `Response.sampled_log_probs` are, so that they need not travel.
_ZEROS, _UNKNOWN, _AS_LOG_PROBS = range(3)

_Array = NDArray[Any]


def request_arrays(requests: Sequence[Request]) -> list[_Array]:
    """Return ``requests`` as arrays, from which `requests_from` makes equal requests; an empty list if there are none.

    The arrays: the tokens of the different prompts one behind the other, int32, and their lengths, int32; then per
    request the index of its prompt, int32, and the seeds, uint64.
    Raises: OverflowError for a token id or a seed that does not fit.
    """
    if not requests:
        return []
    places: dict[bytes, int] = {}

    def place(prompt: Sequence[int]) -> int:
        return places.setdefault(np.array(prompt, np.int32).tobytes(), len(places))

    numbers = [place(request.prompt) for request in requests]
    return [
        np.frombuffer(b"".join(places), np.int32),
        np.array([len(prompt) // 4 for prompt in places], np.int32),
        np.array(numbers, np.int32),
        np.array([request.seed for request in requests], np.uint64),
    ]


def requests_from(arrays: Sequence[_Array]) -> list[Request]:
    """Return the requests of `request_arrays`, in order; requests with equal prompts share one list."""
    if not arrays:
        return []
    tokens, lengths, numbers, seeds = arrays
    prompts = list(cut(tokens, lengths))
    return [Request(prompts[place], seed) for place, seed in zip(numbers.tolist(), seeds.tolist(), strict=True)]


def response_arrays(responses: Sequence[Response]) -> list[_Array]:
    """Return ``responses`` as arrays, from which `responses_from` makes them again; an empty list if there are none.

    Log-probs are rounded to float32, as an engine has computed them; everything else arrives as it is.
    The arrays: lengths, int32; ends, as indices of `FINISH_REASONS`, uint8; kinds of sampled log-probs, uint8; oldest
    versions and numbers of spans, int32; spans, int32; token ids, int32; log-probs, float32.
    Raises: ValueError for sampled log-probs that are neither 0 nor NaN nor equal to the log-probs.
    """
    if not responses:
        return []
    log_probs = [_float32(response.log_probs) for response in responses]
    kinds = [
        (FINISH_REASONS.index(response.finish_reason), _kind(_float32(response.sampled_log_probs), own))
        for response, own in zip(responses, log_probs, strict=True)
    ]
    versions = [_NONE if response.weight_version is None else response.weight_version for response in responses]
    return [
        _int32(len(response.token_ids) for response in responses),
        *np.array(kinds, np.uint8).T,
        _int32(versions),
        _int32(len(response.weight_spans) for response in responses),
        _int32(chain.from_iterable(chain.from_iterable(response.weight_spans for response in responses))),
        _int32(chain.from_iterable(response.token_ids for response in responses)),
        np.concatenate(log_probs),
    ]


def responses_from(arrays: Sequence[_Array]) -> list[Response]:
    """Return the responses of `response_arrays`, in order."""
    if not arrays:
        return []
    lengths, ends, kinds, versions, num_spans, spans, tokens, log_probs = arrays

    def sampled(kind: int, own: list[float]) -> list[float]:
        return own.copy() if kind == _AS_LOG_PROBS else [0.0 if kind == _ZEROS else float("nan")] * len(own)

    responses = []
    columns = (cut(tokens, lengths), cut(log_probs, lengths), cut(spans.reshape(-1, 2), num_spans))
    numbers = (array.tolist() for array in (ends, kinds, versions))
    for token_ids, own, parts, end, kind, version in zip(*columns, *numbers, strict=True):
        responses.append(
            Response(
                token_ids=token_ids,
                log_probs=own,
                sampled_log_probs=sampled(kind, own),
                finish_reason=FINISH_REASONS[end],
                weight_version=None if version == _NONE else version,
                weight_spans=[(version, length) for version, length in parts] or (),
            )
        )
    return responses


def _kind(sampled: _Array, log_probs: _Array) -> int:
    """Return which of the kinds the float32 array ``sampled`` is; two arrays are equal if their bits are."""
    if np.array_equal(sampled.view(np.int32), log_probs.view(np.int32)):
        return _AS_LOG_PROBS
    if not sampled.view(np.int32).any():
        return _ZEROS
    if not np.isnan(sampled).all():
        raise ValueError("expected the log-probs of a plain response, 0 or NaN for those that it was sampled with")
    return _UNKNOWN


def _int32(values: Iterable[int]) -> _Array:
    return np.fromiter(values, np.int32)


def _float32(values: Sequence[float]) -> _Array:
    return np.array(values, np.float32)
