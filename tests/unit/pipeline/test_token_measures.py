# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measures are taken chunk by chunk, without the host, and only those that the target has."""

from __future__ import annotations

import pytest
import torch
from host_traffic import host_traffic
from torch import Tensor

from megatron_selfdistill.loss import Target, VocabShard
from megatron_selfdistill.loss.target import entropy
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement, TokenMeasures

NUM_TOKENS, VOCAB = 23, VocabShard(0, 96, 90)
TARGETS = {
    "student": Target(),
    "reference": Target(anchor="reference"),
    "reference, the student's entropy": Target(anchor="reference", match="student"),
}


def measures(target: Target, chunk_tokens: int, num_tokens: int = NUM_TOKENS) -> tuple[TokenMeasures, list[int]]:
    """Return the measures of random logits, and the numbers of tokens of the chunks."""
    logits = 4 * torch.randn(3, num_tokens, 96, generator=torch.Generator().manual_seed(1))
    chunks = []

    def logits_of(tokens: slice) -> list[Tensor]:
        chunks.append(len(logits[0, tokens]))
        return list(logits[: 3 if target.is_anchored else 2, tokens])

    beta = torch.linspace(0.5, 1.0, num_tokens)
    return TokenMeasurement(target, chunk_tokens).measures(beta, logits_of, VOCAB), chunks


@pytest.mark.parametrize("name", TARGETS)
def test_the_measures_do_not_depend_on_the_chunks(name):
    whole, in_one = measures(TARGETS[name], 512)
    parts, chunks = measures(TARGETS[name], 7)
    assert in_one == [23] and chunks == [7, 7, 7, 2]
    for field, values in vars(whole).items():
        assert (values is None) == (getattr(parts, field) is None), field
        if values is not None:
            torch.testing.assert_close(getattr(parts, field), values, rtol=1e-6, atol=1e-9)
            assert values.shape == (NUM_TOKENS,) and values.dtype == torch.float64
    assert (whole.mass_on_rare_student > 0).all()
    assert (whole.mass_on_rare_reference is None) == (name == "student")


def test_the_references_entropy_is_measured_where_the_loss_does_not_take_it():
    found = {name: measures(target, 512)[0].reference_entropy for name, target in TARGETS.items()}
    assert found["student"] is None and found["reference"] is None
    reference = 4 * torch.randn(3, NUM_TOKENS, 96, generator=torch.Generator().manual_seed(1))[2, :, :90]
    expected = entropy(reference.double().log_softmax(-1))
    torch.testing.assert_close(found["reference, the student's entropy"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_a_microbatch_without_tokens_has_empty_measures(name):
    none, chunks = measures(TARGETS[name], 512, num_tokens=0)
    assert chunks == [0] and none.mass_on_rare_student.shape == (0,)
    some, _ = measures(TARGETS[name], 512)
    joined = TokenMeasures.concatenate([none, some])
    assert all(value is None or torch.equal(value, getattr(joined, field)) for field, value in vars(some).items())


def test_measuring_exchanges_nothing_with_the_host():
    measures(TARGETS["reference, the student's entropy"], 7)  # the first call makes what all calls keep
    with host_traffic() as found:
        measures(TARGETS["reference, the student's entropy"], 7)
    assert found == []
