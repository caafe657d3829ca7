# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measures are taken chunk by chunk, without the host, and only those that the target has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from host_traffic import host_traffic
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.definition import entropy
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy
from megatron_selfdistill.pipeline.token_measures import MeasuringObserver, OwnLogits, TokenMeasurement, TokenMeasures

NUM_TOKENS, VOCAB = 23, VocabShard(0, 96, 90)
TARGETS = {
    "student": Target(anchor="student"),
    "reference": Target(anchor="reference"),
    "reference, the student's entropy": Target(anchor="reference", match="student"),
}

DTYPES = {"measured": torch.bool, "top1_agreement": torch.bool}
DTYPES |= dict.fromkeys(("teacher_entropy", "teacher_log_prob"), torch.float32)


def random_logits(num_tokens: int) -> Tensor:
    """Return the logits of student, mix, reference and teacher."""
    return 4 * torch.randn(4, num_tokens, 96, generator=torch.Generator().manual_seed(1))


def loss_of(logits: Tensor, target: Target, wanted: Tensor | None = None) -> TokenStats:
    tokens = torch.arange(logits.shape[1])
    return distillation_loss(
        logits[0], logits[1], tokens, target=target, divergence=Divergence(), vocab=VOCAB, reference_entropy=wanted
    )


def measures(
    target: Target,
    chunk_tokens: int,
    num_tokens: int = NUM_TOKENS,
    of_loss: Sequence[int] | None = None,
    every: int = 1,
) -> tuple[TokenMeasures, list[int]]:
    """Return the measures of random logits, and the tokens of the chunks; ``of_loss``: those of the loss's chunks."""
    logits, chunks = random_logits(num_tokens), []

    def own_logits(tokens: slice) -> OwnLogits:
        chunks.append(len(logits[0, tokens]))
        return OwnLogits(logits[3, tokens], logits[2, tokens]) if target.is_anchored else OwnLogits()

    wanted = vocab_entropy(logits[2], VOCAB) if target.needs_reference_entropy else None
    measurement = TokenMeasurement(target, chunk_tokens, every=every)
    observe = MeasuringObserver(measurement, VOCAB, torch.arange(num_tokens), own_logits)
    start = 0
    for length in of_loss or [num_tokens]:
        tokens = slice(start, start + length)
        part = None if wanted is None else wanted[tokens]
        observe(tokens, logits[0, tokens], logits[1, tokens], loss_of(logits[:, tokens], target, part))
        start += length
    return TokenMeasures.concatenate(observe.parts), chunks


def test_the_numbers_of_the_teacher_are_those_of_a_loss_that_sees_its_logits():
    logits = random_logits(NUM_TOKENS)
    alone = loss_of(logits[[0, 3]], Target(anchor="student"))
    of_mix = loss_of(logits, TARGETS["reference, the student's entropy"])
    for name in ("reference", "reference, the student's entropy"):
        stats = measures(TARGETS[name], 7)[0].with_teacher(of_mix)
        for field in ("teacher_entropy", "teacher_log_prob", "top1_agreement"):
            torch.testing.assert_close(getattr(stats, field), getattr(alone, field), rtol=1e-6, atol=1e-6)
        assert torch.equal(stats.loss, of_mix.loss)
    without, _ = measures(TARGETS["student"], 7)
    assert not without.has_teacher and without.with_teacher(of_mix) is of_mix


def test_the_references_entropy_is_measured_where_the_loss_does_not_take_it():
    found = {name: measures(target, 512)[0].reference_entropy for name, target in TARGETS.items()}
    assert found["student"] is None and found["reference"] is None
    expected = entropy(random_logits(NUM_TOKENS)[2, :, :90].double().log_softmax(-1))
    torch.testing.assert_close(found["reference, the student's entropy"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_loss", [None, [9, 0, 1, 13]])
@pytest.mark.parametrize("every", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("name", TARGETS)
def test_one_token_in_several_has_the_measures_that_all_tokens_have_in_one_chunk(name, every, of_loss):
    whole, in_one = measures(TARGETS[name], 512)
    assert in_one == [NUM_TOKENS] and (whole.mass_on_rare_student > 0).all()
    assert (whole.mass_on_rare_reference is None) == (name == "student")
    some, chunks = measures(TARGETS[name], 3, of_loss=of_loss, every=every)
    places = TokenMeasurement(TARGETS[name], every=every).places(range(NUM_TOKENS), NUM_TOKENS)
    assert sum(chunks) == len(places) == len(range(0, NUM_TOKENS, every)) and max(chunks) <= 3 + 1
    assert some.measured.nonzero().flatten().tolist() == places
    for field, values in ((name, values) for name, values in vars(whole).items() if values is not None):
        assert values.dtype == DTYPES.get(field, torch.float64)
        torch.testing.assert_close(getattr(some, field)[places], values[places], rtol=1e-6, atol=1e-9)
        assert not getattr(some, field)[~some.measured].any()


@pytest.mark.parametrize("length", [64, 67])
def test_the_mean_of_some_tokens_is_that_of_all_where_the_first_tokens_of_responses_differ(length):
    values = 0.8 ** (torch.arange(16 * length, dtype=torch.float64) % length)
    found = [
        TokenMeasurement(TARGETS["student"], every=8, phase=phase).places(range(len(values)), len(values))
        for phase in range(8)
    ]
    assert sorted(place for places in found for place in places) == list(range(len(values)))
    means = torch.stack([values[places].mean() for places in found]) / values.mean()
    assert means.mean() == pytest.approx(1) and 0.5 < means.min() < means.max() < 1.6, "not the 2.5 of every eighth"


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
