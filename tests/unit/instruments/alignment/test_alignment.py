# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gradient alignment equals autograd of success and of the divergences, and its worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.instruments.alignment.alignment import (
    alignment,
    chosen_nodes,
    cosine,
    descent,
    ideal_direction,
    limit_groups,
    success_with_rest,
    with_rest,
)
from megatron_selfdistill.loss.target import Target, mixed_target

S, T, SUCCESS = (1.2, 0.3, -0.5, 0.0), (0.2, 1.5, -1.0, 0.4), np.array([0.10, 0.80, 0.50, 0.40])


def probabilities(logits) -> np.ndarray:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).numpy()


def test_the_worked_example():
    p, teacher = probabilities(S), probabilities(T)
    g = ideal_direction(p, SUCCESS)
    assert g == pytest.approx((-0.125366, 0.099576, 0.015752, 0.010038), abs=5e-7)
    assert cosine(g, descent(p, teacher, "reverse_kl")) == pytest.approx(0.979657, abs=5e-7)
    assert cosine(g, descent(p, teacher, "forward_kl")) == pytest.approx(0.974218, abs=5e-7)
    logits = [torch.tensor([row], dtype=torch.float64) for row in (S, T)]
    mix = mixed_target(*logits, Target(anchor="student")).log_q[0].exp().numpy()
    assert cosine(g, descent(p, mix, "reverse_kl")) == pytest.approx(0.914264, abs=5e-7)
    # The same direction by hand: D = log M - log p with M = (p + q) / 2.
    gap = np.log((p + teacher) / 2) - np.log(p)
    assert cosine(g, descent(p, teacher, "jsd")) == pytest.approx(cosine(g, p * (gap - p @ gap)), abs=1e-12)
    assert alignment(p, mix, SUCCESS, "reverse_kl") == pytest.approx(0.914264, abs=5e-7), "candidates without a rest"


logits = st.lists(st.tuples(*[st.floats(-6, 6)] * 3), min_size=2, max_size=8)


@given(logits, st.floats(0.05, 0.95))
def test_directions_are_gradients(rows, lam):
    s, t, chance = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    s.requires_grad_()
    log_p, log_q, success = s.log_softmax(-1), t.log_softmax(-1), chance.sigmoid()
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
    values = {
        "success": (log_p.exp() * success).sum(),
        "reverse_kl": -(log_p.exp() * (log_p - log_q)).sum(),
        "forward_kl": -(log_q.exp() * (log_q - log_p)).sum(),
        "jsd": -(lam * log_q.exp() * (log_q - log_m) + (1 - lam) * log_p.exp() * (log_p - log_m)).sum(),
    }
    expected = {name: torch.autograd.grad(value, s, retain_graph=True)[0].numpy() for name, value in values.items()}
    p, q = log_p.detach().exp().numpy(), log_q.exp().numpy()
    assert ideal_direction(p, success.numpy()) == pytest.approx(expected["success"], abs=1e-14)
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        assert descent(p, q, divergence, lam) == pytest.approx(expected[divergence], abs=1e-13)


def test_the_rest_is_one_token_with_the_mean_success():
    p, q = np.array([0.5, 0.25]), np.array([0.1, 0.5])
    assert with_rest(p).tolist() == [0.5, 0.25, 0.25]
    success = success_with_rest(p, np.array([0.0, 0.75]))
    assert success.tolist() == [0.0, 0.75, 0.25]
    assert ideal_direction(with_rest(p), success)[-1] == 0, "neither more nor less of what nobody tried"
    expected = cosine(ideal_direction(with_rest(p), success), np.array([0.1 - 0.5, 0.5 - 0.25, 0.4 - 0.25]))
    assert alignment(p, q, np.array([0.0, 0.75]), "forward_kl") == pytest.approx(expected)
    assert with_rest(np.array([0.7, 0.3 + 1e-12])).tolist()[-1] == 0


def test_a_token_that_the_target_excludes_gives_no_infinity():
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    down = descent(p, q, "reverse_kl")
    assert np.isfinite(down).all() and down[0] == pytest.approx(-down[1]) and down[0] > 0
    assert alignment(p, q, np.array([1.0, 0.0]), "reverse_kl") == pytest.approx(1)
    assert alignment(p, q, np.array([0.0, 1.0]), "reverse_kl") == pytest.approx(-1)


@pytest.mark.parametrize(("target", "success"), [([0.5, 0.25], [0.0, 1.0]), ([0.1, 0.5], [0.3, 0.3])])
def test_without_a_direction_there_is_no_cosine(target, success):
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        assert alignment(np.array([0.5, 0.25]), np.array(target), np.array(success), divergence) is None
    assert cosine(np.array([1e-17, -2e-17]), np.array([1.0, -1.0])) is None, "only rounding is left"


def test_another_divergence_is_refused():
    with pytest.raises(ValueError, match="expected reverse_kl, forward_kl or jsd, got 'skew'"):
        descent(np.array([1.0]), np.array([1.0]), "skew")


def test_nodes_are_chosen_by_position_and_by_kl():
    kl = [0.0] * 40
    kl[7], kl[8], kl[31], kl[5] = 3.0, 2.0, 2.0, math.nan
    assert chosen_nodes(kl, 6) == {6: "position", 7: "kl", 8: "kl", 20: "position", 31: "kl", 33: "position"}
    assert chosen_nodes(kl, 2) == {7: "kl", 20: "position"}
    assert chosen_nodes([1.0, 2.0], 16) == {0: "position", 1: "position"}


@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 20))
def test_the_number_of_nodes_is_kept(kl, number):
    chosen = chosen_nodes(kl, number)
    assert len(chosen) == min(len(kl), number) and list(chosen) == sorted(chosen)
    assert all(0 <= position < len(kl) for position in chosen)


def test_limits_are_grouped_as_far_as_there_is_room():
    assert limit_groups([3, 9, 10, 4, 9], 0) == [[10], [9], [4], [3]]
    assert limit_groups([3, 9, 10, 4, 9], 1) == [[10, 9], [4, 3]]
    assert limit_groups([3, 9, 10, 4, 9], 7) == [[10, 9, 4, 3]]
    assert limit_groups([], 7) == []
