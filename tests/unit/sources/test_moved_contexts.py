# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A context in a parcel keeps every bit of what the step needs of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_selfdistill.data.contexts import ContextPair, EpisodeTurn, TeacherPrompt
from megatron_selfdistill.loss.weighting import SequenceImportance, TokenOwners
from megatron_selfdistill.sources.moved_contexts import _opened, _parcel, _values_of_tokens, chosen
from megatron_selfdistill.sources.signals import Clip, Terms
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.sources.step_terms import RatioTerms

TURN = EpisodeTurn(episode=3, turn=1, reward=1 / 3, hint="\ud800 ü\0", reply=None)
CONTEXTS = [
    ContextPair("a/0", [1], [5, 2**31 - 1, 0], [7, 8, 9], truncated=True),
    ContextPair("nothing", [3, 4], [4], [], truncated=False, turn=TURN),
    ContextPair(
        *("\ud800 ü \N{GRINNING FACE}\0", [2] * 9, [6], [1, 1]),
        **{"truncated": False, "teacher": "math"},
        of_teachers=(
            TeacherPrompt("math", 1 / 3, [6]),
            TeacherPrompt("code", 2 / 3, [7, 0, 7]),
            TeacherPrompt("c", 0.0, []),
        ),
        control_prompts=([5], [1, 2]),
    ),
    ContextPair("controls", [1, 2], [9], [], truncated=False, control_prompts=([8, 8], [], [7])),
]
SOLUTIONS = ["x = 1\r\n", "", "答え", "y"]
LOG_PROBS = torch.tensor([-0.1, -math.inf, math.inf, -1e-300, -3.0], dtype=torch.float64)
CPU = torch.device("cpu")


def over_ranks(sums: torch.Tensor) -> torch.Tensor:
    return sums


def batch_of(coefficients: Any) -> StepBatch:
    own = {"contexts": CONTEXTS, "solutions": SOLUTIONS, "sampler_log_probs": LOG_PROBS, "metrics": {"found": 1.0}}
    return StepBatch(**own, token_coefficients=coefficients, share=0.5)


def terms() -> RatioTerms:
    columns = [torch.arange(5.0, dtype=torch.float64) * number for number in range(1, 5)]
    mu = LOG_PROBS.nan_to_num(neginf=-9, posinf=-8)
    correction = SequenceImportance(mu, TokenOwners.of([3, 0, 2, 0], over_ranks), cap=1e9)
    return RatioTerms(Terms(*columns, -columns[1]), mu, None, Clip(0.2, 0.3), correction=correction)


def test_a_parcel_of_some_contexts_has_all_of_them_with_their_flags_in_its_order():
    batch, order = batch_of(terms()), [2, 0, 3, 1]
    assert chosen(batch, order[:2], CPU).contexts == [CONTEXTS[2], CONTEXTS[0]]
    found = _opened(batch, [_parcel(batch, _values_of_tokens(batch), order)], CPU)
    assert found.contexts == [CONTEXTS[i] for i in order]
    assert found.solutions == [SOLUTIONS[i] for i in order]
    assert (found.metrics, found.share) == (batch.metrics, batch.share)
    tokens = torch.tensor([3, 4, 0, 1, 2])
    assert found.sampler_log_probs.equal(LOG_PROBS[tokens])
    own, other = batch.token_coefficients, found.token_coefficients
    assert (other.clip, other.target_log_prob) == (Clip(0.2, 0.3), None)
    log_prob = torch.linspace(-3, -1, 5)
    for field in ("divergence", "policy", "clipped"):
        before = getattr(own(log_prob[tokens], tokens), field)
        assert getattr(other(log_prob[tokens], torch.arange(5)), field).equal(before)


def test_a_batch_without_log_probs_and_coefficients_has_none_in_its_parcel():
    batch = StepBatch(contexts=CONTEXTS)
    found = _opened(batch, [_parcel(batch, _values_of_tokens(batch), [0])], CPU)
    assert found.contexts == CONTEXTS[:1] and found.sampler_log_probs is None and found.token_coefficients is None


def test_a_replica_may_have_no_contexts():
    batch = batch_of(terms())
    empty = _opened(batch, [_parcel(batch, _values_of_tokens(batch), [])], CPU)
    assert (empty.contexts, empty.solutions) == ([], [])
    assert empty.sampler_log_probs.shape == (0,) and empty.token_coefficients.correction.owners.num_responses == 0


def test_a_coefficient_that_is_no_value_per_token_cannot_travel():
    with pytest.raises(AssertionError, match="has a value per token"):
        _values_of_tokens(batch_of(SequenceImportance(torch.zeros(4), TokenOwners.of([4], over_ranks))))
