# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests and responses are the same after they have travelled as arrays, in 8 bytes per token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.engines.vllm.arrays import (
    NUM_RESPONSE_ARRAYS,
    request_arrays,
    requests_from,
    response_arrays,
    responses_from,
)
from megatron_selfdistill.rollout.base import FINISH_REASONS, Request, Response

TOKENS = st.integers(0, 2**31 - 1)
PROMPTS = st.lists(TOKENS, max_size=4)
REQUESTS = st.builds(Request, PROMPTS, st.integers(0, 2**64 - 1))
FLOATS = st.floats(width=32)


@st.composite
def responses(draw: st.DrawFn) -> Response:
    tokens = draw(st.lists(TOKENS, max_size=4))
    count = len(tokens)
    log_probs = draw(st.lists(FLOATS, min_size=count, max_size=count))
    sampled = draw(st.sampled_from([log_probs, [0.0] * count, [math.nan] * count]))
    versions = st.integers(0, 2**31 - 1)
    spans = draw(st.lists(st.tuples(versions, versions), max_size=3)) or ()
    return Response(
        tokens,
        log_probs,
        sampled,
        draw(st.sampled_from(FINISH_REASONS)),
        weight_version=draw(st.none() | versions),
        weight_spans=spans,
    )


@given(st.lists(REQUESTS, max_size=5))
def test_requests_are_equal_after_they_have_travelled(requests):
    assert requests_from(request_arrays(requests)) == requests


@given(st.lists(responses(), max_size=5))
def test_responses_with_float32_log_probs_are_equal_after_they_have_travelled(some):
    arrays = response_arrays(some)
    assert len(arrays) == (NUM_RESPONSE_ARRAYS if some else 0)
    assert repr(responses_from(arrays)) == repr(some)  # NaN is not equal to itself, and 0.0 equals -0.0


def num_bytes(arrays: list[np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays)


def test_a_prompt_travels_once_however_many_requests_have_it():
    prompt = list(range(1000))
    one, many = (num_bytes(request_arrays([Request(list(prompt), seed) for seed in range(count)])) for count in (1, 9))
    assert one == 4 * 1000 + 4 + 12 and many == one + 8 * 12  # a place and a seed of 8 bytes per request


@pytest.mark.parametrize("sampled", [-0.5, 0.0, math.nan])
def test_a_token_takes_4_bytes_and_its_log_prob_4(sampled):
    short, long = (
        num_bytes(response_arrays([Response([7] * n, [-0.5] * n, [sampled] * n, "stop")])) for n in (10, 110)
    )
    assert long - short == 100 * 8


def test_sampled_log_probs_that_no_engine_states_are_refused_and_not_changed():
    with pytest.raises(ValueError, match="0 or NaN for those that it was sampled with"):
        response_arrays([Response([7], [-0.5], [-0.25], "stop")])


@pytest.mark.parametrize("request_", [Request([2**31], 1), Request([1], -1), Request([1], 2**64)])
def test_numbers_that_do_not_fit_are_refused_and_not_changed(request_):
    with pytest.raises(OverflowError):
        request_arrays([request_])
