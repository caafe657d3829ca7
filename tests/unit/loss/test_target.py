# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target on full rows matches entropies, respects the bound and has a status for every token; one k of a step."""

from __future__ import annotations

import dataclasses
import math

import distributions as tool
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_pairs import TARGETS, by_bisection, entropy, pair

from megatron_selfdistill.config import TargetConfig
from megatron_selfdistill.loss import Status, Target, beta_grid, mixed_target, solve_batch_k
from megatron_selfdistill.loss.target import unit_mix

STRICT = Target(k_max=None, anchor="student")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.05, 4.0))
def test_the_strict_target_has_the_students_entropy(seed: int, weight: float) -> None:
    s, t = pair(seed)
    rows = mixed_target(s, t, Target(teacher_weight=weight, k_max=None, anchor="student"))
    matched = rows.status == Status.MATCHED
    assert matched.any()
    gap = entropy(rows.log_q) - entropy(s.log_softmax(-1))
    assert gap[matched].abs().max() < 1e-12
    expected = (rows.beta[:, None] * (weight * t + s)).log_softmax(-1)
    torch.testing.assert_close(rows.log_q, expected, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k_max=st.sampled_from(["1 + w", 0.5, 1.2, 3.0]))
def test_the_bound_holds_and_a_capped_target_is_sharper_than_the_student(seed: int, k_max: float | str) -> None:
    s, t = pair(seed)
    s, t = torch.cat([s, s]), torch.cat([t, 2 * s])
    target = Target(k_max=k_max, anchor="student")
    rows, free = mixed_target(s, t, target), mixed_target(s, t, STRICT)
    assert target.k_bound is not None
    torch.testing.assert_close(rows.beta, free.beta.clamp(min=1 / target.k_bound), rtol=1e-12, atol=0)
    capped = rows.status == Status.CAPPED
    assert torch.equal(capped, free.beta < 1 / target.k_bound)
    assert (entropy(rows.log_q) <= entropy(s.log_softmax(-1)) + 1e-9)[capped].all()


REFERENCE = {
    "reference's entropy": Target(anchor="reference"),
    "reference's entropy, strict": Target(anchor="reference", k_max=None),
    "student's entropy": Target(anchor="reference", match="student", teacher_weight=2.0),
    "student's entropy, strict": Target(anchor="reference", match="student", k_max=None),
    "geometric mean": Target("fixed", anchor="reference"),
    "reference, k 1.3": Target("fixed", k=1.3, anchor="reference"),
    "reference, batch": Target("batch", k=1.9, k_max=None, anchor="reference"),
}


@pytest.mark.parametrize("name", [*TARGETS, *REFERENCE])
def test_the_definition_equals_bisection_in_float64(name: str) -> None:
    """Among the rows are sharp, flat and tied ones, forks, equal models, and a student far from the reference."""
    target = (TARGETS | REFERENCE)[name]
    scale = torch.linspace(0.1, 1.7, 12, dtype=torch.float64)[:, None]
    (reference, noise), (student, _) = (tuple(scale * it for it in pair(seed, 12, 150)) for seed in (6, 7))
    teacher, student = reference + 0.4 * noise, reference + 0.2 * student
    student[0] = teacher[0] = reference[0]
    teacher[2] = 40 * reference[2]
    reference[3, :2] = teacher[3, 5:7] = 20.0  # two forks, with other columns
    reference[4] = teacher[4] = 0.0
    student[5] += 1e4
    log_q, beta = by_bisection(student, teacher, target, reference)
    found = mixed_target(student, teacher, target, reference if target.is_anchored else None)
    known = found.status != Status.UNDETERMINED
    assert known.sum() >= 9
    torch.testing.assert_close(found.beta[known], beta[known], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.log_q[known].exp(), log_q[known].exp(), rtol=0, atol=1e-6)


def test_every_status_says_what_happened() -> None:
    flat, sharp, sure = torch.zeros(8).double(), torch.arange(8).double(), torch.tensor([40.0] + [0.0] * 7)
    student = torch.stack([sharp, sharp, sure.double(), flat + 0.01 * sharp])
    teacher = torch.stack([3 * sharp, -sharp, sharp, 40 * sharp])
    capped, matched, undetermined = Status.CAPPED, Status.MATCHED, Status.UNDETERMINED
    found = mixed_target(student, teacher, Target(anchor="student")).status
    assert found.tolist() == [capped, matched, undetermined, capped]
    assert mixed_target(student, teacher, STRICT).status[3] == Status.OUT_OF_RANGE
    tied = torch.tensor([[3.0, 0.0, -5.0]]).double(), torch.tensor([[0.0, 4.0, 0.0]]).double()
    rows = mixed_target(*tied, STRICT)
    assert rows.status == Status.OUT_OF_RANGE and rows.beta.item() == pytest.approx(16 / 1.75)
    assert (mixed_target(student, teacher, Target("fixed", k=2.0, anchor="student")).status == Status.GIVEN).all()


@pytest.mark.parametrize(
    ("target", "count", "lowest"),
    [
        (STRICT, 9, 1 / 16 / 1.75),
        (Target(anchor="student"), 5, 1 / 1.75),
        (Target(k_max=2.0, anchor="student"), 6, 0.5),
        (Target(k_max=0.5, anchor="student"), 4, 2.0),
        (Target(k_max=1000.0, anchor="student"), 9, 1 / 16 / 1.75),
        (Target("fixed", k=4.0, anchor="student"), 1, 0.25),
        (Target("teacher_alone", anchor="student"), 1, 1.0),
    ],
)
def test_the_grid_starts_at_the_bound_and_goes_on_by_octaves_of_the_geometric_mean(
    target: Target, count: int, lowest: float
) -> None:
    grid = beta_grid(target)
    assert len(grid) == count and grid[0] == pytest.approx(lowest)
    if count > 1:
        octaves = (torch.tensor(grid[1:]) * 1.75).log2()
        torch.testing.assert_close(octaves, torch.arange(6.0 - count, 5.0))
        assert grid[-1] * 1.75 == pytest.approx(16)
    assert target.lowest_is_bound == (target.k_max is not None and target.k_max != 1000.0)


def test_the_unit_mix_of_tokens_with_their_own_weights_is_that_of_each_token_alone():
    """A token of weight 0 has the anchor's logits, also in columns where the teacher's are -inf."""
    anchor, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    teacher[:, 1] = -torch.inf
    weights = torch.tensor([0.0, 0.75, 2.0])
    expected = [unit_mix(anchor[i], teacher[i], float(weights[i])) for i in range(3)]
    mixed = unit_mix(anchor, teacher, weights)
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert torch.equal(mixed[0], anchor[0]) and mixed[1:, 1].isneginf().all()


@pytest.mark.parametrize("name", tool.DISTRIBUTIONS)
def test_the_batch_k_is_as_near_to_the_mean_entropy_as_its_docstring_says(name: str) -> None:
    s, t = (x.double() for x in tool.draw(name, 64, 1000, 2))
    grid, mix, wanted = beta_grid(STRICT), 0.75 * t + s, entropy(s.log_softmax(-1)).mean()
    means = torch.stack([entropy((beta * mix).log_softmax(-1)).mean() for beta in grid])
    k = solve_batch_k(float(wanted), grid, means, None, max_entropy=math.log(1000))
    if means[0] > wanted > means[-1]:
        off = float((entropy((mix / k).log_softmax(-1)).mean() - wanted).abs())
        assert off <= (0.02 if name in ALIKE else 0.25)


ALIKE = {
    *("language model", "language model, bf16", "large offsets", "zipf", "one-hot, H ~ 1e-1", "one-hot, H ~ 1e-4"),
    *("flat", "masked", "teacher ~ student", "forks, bf16"),
}


def test_the_batch_k_is_exact_at_grid_points_and_clamped_outside() -> None:
    betas, entropies = [0.5, 1.0, 2.0, 4.0], [4.0, 3.0, 1.5, 0.2]
    for beta, value in zip(betas, entropies, strict=True):
        assert solve_batch_k(value, betas, entropies, None) == pytest.approx(1 / beta, rel=1e-9)
    assert solve_batch_k(5.0, betas, entropies, None) == 2.0
    assert solve_batch_k(5.0, betas, entropies, 1.75) == 1.75
    assert solve_batch_k(0.0, betas, entropies, None) == 0.25
    ks = [solve_batch_k(h, betas, entropies, None) for h in torch.linspace(0.2, 4.0, 50).tolist()]
    assert ks == sorted(ks)


def test_a_target_in_python_has_the_defaults_of_the_configuration() -> None:
    configured = TargetConfig()
    expected = {field.name: getattr(configured, field.name) for field in dataclasses.fields(Target)}
    undecided = {"num_controls": 0, "anchor": "reference"}
    assert dataclasses.asdict(Target()) == expected | undecided, "no controls, and an anchor that no data decide"
    assert Target() == Target.configured(configured)


def test_the_match_on_a_two_way_fork_keeps_the_reference_or_returns_its_mirror_image() -> None:
    """Flips where w > w* = logit(r) / logit(t), in absolute value."""
    r, t = math.log(0.1 / 0.9), math.log(0.7 / 0.3)
    flip = abs(r / t)
    reference, teacher = (torch.tensor([[value, 0.0]], dtype=torch.float64) for value in (r, t))
    for weight, expected in ((0.5 * flip, 0.1), (1.6 * flip, 0.9)):
        target = Target(teacher_weight=weight, k_max=None, anchor="reference")
        q = mixed_target(torch.zeros(1, 2).double(), teacher, target, reference).log_q.exp()
        assert q[0, 0].item() == pytest.approx(expected, abs=1e-9)


def test_with_the_geometric_k_reverse_kl_is_distillation_with_a_penalty_to_the_reference() -> None:
    """(1 + w) KL(p || q) = w KL(p || t) + KL(p || r) + const, so the gradients are equal."""
    (s, t), (r, _) = pair(1), pair(2)
    s.requires_grad_()
    log_p, log_t, log_r = s.log_softmax(-1), t.log_softmax(-1), r.log_softmax(-1)
    log_q = mixed_target(s.detach(), t, Target("fixed", anchor="reference"), r).log_q
    ours = 1.75 * (log_p.exp() * (log_p - log_q)).sum()
    theirs = (log_p.exp() * (0.75 * (log_p - log_t) + (log_p - log_r))).sum()
    for a, b in zip(torch.autograd.grad(ours, s, retain_graph=True), torch.autograd.grad(theirs, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_the_target_stands_still_while_the_student_moves_and_does_not_where_it_matches_the_student() -> None:
    (s, t), (r, _) = pair(3), pair(4)
    for target, stands in ((Target(anchor="reference"), True), (Target(anchor="reference", match="student"), False)):
        first, second = (mixed_target(student, t, target, r).log_q for student in (s, 0.2 * s))
        assert torch.equal(first, second) == stands


def test_equal_logits_give_the_geometric_mean_and_the_student_itself() -> None:
    s, _ = pair(0)
    for target in (STRICT, Target(anchor="student"), Target(k_max=1.0, teacher_weight=0.0, anchor="student")):
        rows = mixed_target(s, s, target)
        torch.testing.assert_close(rows.beta * target.geometric_k, torch.ones(16).double(), rtol=1e-12, atol=0)
        torch.testing.assert_close(rows.log_q, s.log_softmax(-1), rtol=0, atol=1e-12)
        assert (rows.status == Status.MATCHED).all()
    for target in REFERENCE.values():
        if target.rule != "batch" and target.k is None:
            torch.testing.assert_close(mixed_target(s, s, target, s).log_q, s.log_softmax(-1), rtol=0, atol=1e-12)


def test_given_rules_use_their_k_and_teacher_alone_is_the_teacher() -> None:
    s, t = pair(1)
    mix = 0.75 * t + s
    for target, expected in (
        (Target("fixed", k=2.5, anchor="student"), mix / 2.5),
        (Target("fixed", anchor="student"), mix / 1.75),
        (Target("batch", anchor="student"), mix / 1.75),
        (Target("batch", k=1.1, anchor="student"), mix / 1.1),
        (Target("teacher_alone", anchor="student"), t),
    ):
        torch.testing.assert_close(mixed_target(s, t, target).log_q, expected.log_softmax(-1))


@pytest.mark.parametrize("k_max", [None, "1 + w"])
def test_the_batch_k_matches_the_mean_entropies(k_max: float | str | None) -> None:
    s, t = pair(5, 64)
    target = Target("batch", k_max=k_max, anchor="student")
    grid = beta_grid(Target(k_max=k_max, anchor="student"))
    mix = 0.75 * t + s
    means = [entropy((beta * mix).log_softmax(-1)).mean() for beta in grid]
    wanted = entropy(s.log_softmax(-1)).mean()
    k = solve_batch_k(float(wanted), grid, torch.stack(means), target.k_bound, max_entropy=math.log(200))
    reached = entropy((mix / k).log_softmax(-1)).mean()
    assert abs(float(reached - wanted)) < 0.02
    rough = solve_batch_k(float(wanted), grid, torch.stack(means), target.k_bound)
    assert rough == pytest.approx(k, rel=0.1)
