# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The numbers of the method's claims are those of whole rows of logits, in every layout, and change no gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from anchored import rows_of
from layouts import Case, contexts, contexts_of, packed, scheduled
from logit_pairs import kl
from parity import CHANGE, ROUNDINGS, UNIT_ROUNDOFF, case_of, changed_weights
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.loss.definition import entropy, mixed_target
from megatron_selfdistill.loss.sharded.target_measures import RARE
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.model.build import wrap_for_training
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

TARGETS = {
    "student": Target(teacher_weight=2.0, anchor="student"),
    "reference": Target(anchor="reference", teacher_weight=2.0),
    "reference, the student's entropy": Target(anchor="reference", match="student"),
    "student and controls": Target(anchor="student", num_controls=2),
    "reference and controls": Target(num_controls=2),
}
FUSED = Fusion("keep_gradient", 4)
LAYOUTS = {name: case_of(name) for name in ("TP2+SP", "PP2", "CP2")}
LAYOUTS |= {"one rank, fused": (Case(fusion=FUSED), 1), "TP2, fused": case_of("TP2", fusion=FUSED)}
LAYOUTS |= {"DP2": case_of("DP2", pair_order="alternating", paired=True)}
CLAIMS = ("target/", "teacher/", "control/", "forks/", "reverse_kl/")
OF_TEACHER = ("entropy/teacher", "teacher_cross_entropy", "top1_agreement")
# Random models of a tiny vocabulary have no rare tokens: logits are this much larger than theirs.
SCALE = 4.0
AMPLIFICATION = 1500.0
"""The relative change of a number per relative change of the weights, in the number where this is largest.

It is the reverse KL of a tenth with a near tie: where the anchor is nearly certain, k is proportional to the difference
of the two largest mixed logits, which are .08 apart and 56 large in one token.
"""
BOUND = ROUNDINGS * UNIT_ROUNDOFF * AMPLIFICATION


Measured = tuple[dict[str, float], list[torch.Tensor]]
"""The metrics and the gradients of one step on one rank."""


def sharpened(chunks: Sequence[Any]) -> None:
    for chunk in chunks:
        layer = getattr(unwrapped(chunk), "output_layer", None)
        if layer is not None and layer.weight is not None:
            layer.weight.data.mul_(SCALE)


def step(case: Case, measures: bool, apart: bool) -> Measured:
    """Run one step of ``case`` on this rank; ``apart`` gives the reference a copy of the weights of its own."""
    model = models.model_config(case.kind)
    chunks, grid = models.build(model, case.parallel, optimizer=case.optimizer, schedule=case.schedule)
    teacher = models.another(model, chunks, grid)
    copies = models.another(model, chunks, grid) if apart else teacher
    for frozen in [chunks, teacher, copies][: 2 + apart]:
        sharpened(frozen)
    student = wrap_for_training(chunks, case.optimizer)
    for chunk in student:
        chunk.zero_grad_buffer()
    measurement = TokenMeasurement(case.target, chunk_tokens=5) if measures else None
    output = scheduled(case, student, teacher, copies, packed(case, grid), grid, measurement=measurement)
    lengths = [len(context.response) for context in contexts()[grid.dp_rank :: grid.dp_size]]
    metrics = step_metrics(output, None, grid, response_lengths=lengths)
    gradients = [parameter.main_grad.clone() for chunk in student for parameter in chunk.parameters()]
    return {key: metrics[key] for key in metrics if key.startswith(CLAIMS + OF_TEACHER)}, gradients


def steps(case: Case, measures: bool = True, apart: bool = False, names: Sequence[str] = ()) -> list[Measured]:
    cases = [dataclasses.replace(case, kind="shallow", target=TARGETS[name]) for name in names or TARGETS]
    return [step(each, measures, apart) for each in cases]


@pytest.fixture(scope="module")
def alone(ranks) -> list[Measured]:
    (found,) = ranks.run(steps, Case(), world_size=1)
    return found


def logits_by_definition(kind: str) -> list[torch.Tensor]:
    """Return whole rows of logits [R, V] in float64 of student, teacher, reference and two controls, by context."""
    model = models.model_config(kind)
    student, grid = models.build(model, ParallelConfig())
    teacher = models.another(model, student, grid)
    for chunks in (student, teacher):
        sharpened(chunks)
    with torch.no_grad():
        with_controls = contexts_of(Case(target=Target(num_controls=2)))
        rows = [rows_of(context, student[0], teacher[0], teacher[0]) for context in with_controls]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def test_one_rank_has_the_numbers_of_the_definition(ranks, alone):
    ((s, t, r, *controls),) = ranks.run(logits_by_definition, "shallow", world_size=1)
    log_p, log_t, log_r = s.log_softmax(-1), t.log_softmax(-1), r.log_softmax(-1)
    tokens = torch.tensor([token for context in contexts() for token in context.response])
    tenths = torch.cat([torch.arange(n) * 10 // n for n in (len(context.response) for context in contexts())])
    for target, (found, _) in zip(TARGETS.values(), alone, strict=True):
        of_controls = torch.stack(controls) if target.num_controls else None
        log_q = mixed_target(s, t, target, r if target.is_anchored else None, of_controls).log_q
        anchor = log_r if target.is_anchored else log_p
        forks = entropy(anchor) >= found["forks/entropy_at_least"] * (1 - 1e-6)
        assert len(forks) > 60 and 0.1 * len(forks) <= forks.sum() <= 0.15 * len(forks)
        expected = {
            "forks/entropy_student": entropy(log_p)[forks].mean(),
            "forks/entropy_target": entropy(log_q)[forks].mean(),
            "entropy/teacher": entropy(log_t).mean(),
            "teacher_cross_entropy": -log_t.gather(1, tokens[:, None]).mean(),
            "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double().mean(),
            "target/mass_on_rare_student": torch.where(log_p < math.log(RARE), log_q.exp(), 0.0).sum(-1).mean(),
        }
        if target.is_anchored:
            mass = torch.where(log_r < math.log(RARE), log_q.exp(), 0.0).sum(-1)
            expected["target/mass_on_rare_reference"] = mass.mean()
        expected["teacher/kl_to_anchor"] = kl(log_t, anchor).mean()
        expected["target/let_through"] = kl(log_q, anchor).sum() / kl(log_t, anchor).sum()
        if of_controls is not None:
            log_c = of_controls.softmax(-1).mean(0).log()
            expected |= {"control/general": kl(log_c, anchor).mean(), "control/specific": kl(log_t, log_c).mean()}
        reverse_kl = kl(log_p, log_q)
        for tenth in range(10):
            expected[f"reverse_kl/tenth_{tenth + 1:02d}"] = reverse_kl[tenths == tenth].mean()
        assert found.keys() == {*expected, "forks/entropy_at_least", "forks/capped"}
        for key, value in expected.items():
            assert found[key] == pytest.approx(float(value), rel=2e-3), key
        assert min(found[key] for key in expected if key.startswith("target/")) > 1e-3, "a test of nothing"


def assert_same_numbers(found: list[Measured], alone: list[Measured], names: Sequence[str]) -> None:
    for name, (metrics, _) in zip(names, found, strict=True):
        assert metrics == pytest.approx(alone[list(TARGETS).index(name)][0], rel=BOUND), name


@pytest.mark.full
@combinations(name=list(LAYOUTS))
def test_every_layout_has_the_numbers_of_one_rank(ranks, alone, name):
    case, world_size = LAYOUTS[name]
    names = ["student", "reference, the student's entropy", "reference and controls"]
    for found in ranks.run(steps, case, True, False, names, world_size=world_size):
        assert_same_numbers(found, alone, names)


def steps_with_changed_weights(seed: int) -> list[Measured]:
    with changed_weights(seed):
        return steps(Case())


@pytest.mark.full
def test_the_numbers_amplify_a_change_of_the_weights_as_the_bound_says(ranks, alone):
    """The measurement is that of exact arithmetic, up to the curvature: it does not depend on the machine."""
    worst = 0.0
    for seed in (1, 4):
        (changed,) = ranks.run(steps_with_changed_weights, seed, world_size=1)
        for (moved, _), (exact, _) in zip(changed, alone, strict=True):
            changes = [abs(moved[key] / value - 1) for key, value in exact.items() if value]
            worst = max(worst, max(changes) / CHANGE)
    assert AMPLIFICATION / 4 <= worst <= AMPLIFICATION


def test_a_reference_with_its_own_copy_of_the_weights_has_the_same_numbers(ranks, alone):
    names = ["reference", "reference and controls"]
    (found,) = ranks.run(steps, Case(), True, True, names, world_size=1)
    assert_same_numbers(found, alone, names)


def test_a_measurement_changes_no_bit_of_a_gradient(ranks, alone):
    (without,) = ranks.run(steps, Case(), False, world_size=1)
    for target, (measured, gradients), (plain, of_plain) in zip(TARGETS.values(), alone, without, strict=True):
        assert not any(key.startswith("target/") for key in plain) and set(OF_TEACHER) <= measured.keys()
        assert all(map(torch.equal, gradients, of_plain)) and gradients
        assert ("entropy/teacher" in plain) == target.reads_teacher
        # Only the match with the reference needs its entropy at every step.
        assert ("forks/capped" in plain) == (target.needs_reference_entropy or not target.is_anchored)
