# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The one k of a step under the rule "batch"."""

from __future__ import annotations

import math

import pytest
import torch
from logit_pairs import entropy, pair
from plateaus import tool

from megatron_selfdistill.loss import Target, beta_grid, solve_batch_k

STRICT = Target(k_max=None, anchor="student")


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
