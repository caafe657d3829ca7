# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Explored responses hold the logits of whole rows, and are the same in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import models
import pytest
import torch
from layouts import Case, contexts, packed, scheduled
from parity import case_of
from tiers import combinations

from megatron_selfdistill.instruments.explorer.explored import ExploredResponse, TokenTarget, explored_responses
from megatron_selfdistill.loss.definition import mixed_target
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

TARGETS = {
    "student": Target(anchor="student"),
    "reference": Target(anchor="reference", teacher_weight=2.0),
    "controls of the student": Target(anchor="student", num_controls=2),
    "controls": Target(anchor="reference", teacher_weight=2.0, num_controls=2),
}
LAYOUTS = {name: case_of(name) for name in ("TP2+SP", "PP2", "CP2", "CP2xPP2")}
LAYOUTS |= {"one rank, fused": (Case(fusion=Fusion("keep_gradient", 4)), 1)}


def explored(case: Case, apart: bool = False) -> list[ExploredResponse]:
    """Return all contexts as explored responses; ``apart`` gives the reference other weights than the teacher."""
    model = models.model_config(case.kind)
    student, grid = models.build(model, case.parallel, optimizer=case.optimizer, schedule=case.schedule)
    teacher, setting, pairs = models.another(model, student, grid), TokenTarget(case.target, Divergence()), contexts()
    of_reference = models.another(model, student, grid, seed=2) if apart else teacher
    measurement = TokenMeasurement(case.target, chunk_tokens=5, summarise=setting.summarise)
    options = {"measurement": measurement, "forward_only": True}
    output = scheduled(case, student, teacher, of_reference, packed(case, grid), grid, **options)
    return explored_responses(output, pairs, ["" for _ in pairs], setting, models.VOCAB_SIZE, grid)


def in_layout(case: Case, apart: bool = False, names: Collection[str] = tuple(TARGETS)) -> list[list[ExploredResponse]]:
    return [explored(dataclasses.replace(case, kind="shallow", target=TARGETS[name]), apart) for name in names]


@pytest.fixture(scope="module")
def alone(ranks) -> list[list[ExploredResponse]]:
    (found,) = ranks.run(in_layout, Case(), world_size=1)
    return found


def whole_rows(one: ExploredResponse) -> list[torch.Tensor]:
    """Return the logits [n, V] of each model: the vocabulary is so small that every token is a candidate."""
    ids = one.summary.ids[:, : models.VOCAB_SIZE].long()
    assert ids.equal(torch.arange(models.VOCAB_SIZE).expand_as(ids)) and one.summary.counts.sum() == 0
    return list(one.summary.logits[:, :, : models.VOCAB_SIZE].unbind(1))


def check(found: list[list[ExploredResponse]]) -> None:
    for target, responses in zip(TARGETS.values(), found, strict=True):
        assert len(responses) == len(contexts()) > 3
        for one in responses:
            s, t, *rest = whole_rows(one)
            c = rest.pop().expand(2, -1, -1) if target.num_controls else None  # as the mean of two equal controls
            exact = mixed_target(s, t, target, rest[0] if rest else None, c)
            torch.testing.assert_close(torch.tensor(one.numbers["beta"]), exact.beta.float(), rtol=2e-3, atol=0)
            log_p = s.log_softmax(-1)
            reverse_kl = (log_p.exp() * (log_p - exact.log_q)).sum(-1)
            assert one.numbers["reverse_kl"] == pytest.approx(reverse_kl.tolist(), rel=1e-2, abs=1e-5)
            tokens = torch.tensor(one.context.response)[:, None]
            for name, logits in (("student_log_prob", s), ("teacher_log_prob", t)):
                expected = logits.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
                assert one.numbers[name] == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_the_numbers_are_those_of_the_saved_logits(alone):
    check(alone)


@pytest.mark.full
def test_a_reference_with_weights_of_its_own_keeps_its_logits_apart(ranks):
    (found,) = ranks.run(in_layout, Case(), True, world_size=1)
    check(found)
    _, t, r = whole_rows(found[1][0])
    assert (t - r).abs().max() > 0.1


@pytest.mark.full
@combinations(name=list(LAYOUTS))
def test_every_rank_of_every_layout_has_the_same(ranks, alone, name):
    """The responses of a target with a reference and controls have the logits of all models."""
    case, world_size = LAYOUTS[name]
    for [mine] in ranks.run(in_layout, case, names=["controls"], world_size=world_size):
        for one, other in zip(mine, alone[-1], strict=True):
            assert one.context == other.context and one.summary.ids.equal(other.summary.ids)
            torch.testing.assert_close(one.summary.flat(), other.summary.flat(), rtol=1e-3, atol=1e-3)
            for key in ("beta", "reverse_kl", "mass_on_rare_student", "reference_entropy"):
                expected = pytest.approx(other.numbers[key], rel=1e-3, abs=1e-5, nan_ok=True)
                assert one.numbers[key] == expected, key
