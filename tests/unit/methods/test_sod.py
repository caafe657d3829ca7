# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SOD's weights of turns as a pure function of arrays, against the numbers of a worked example."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_selfdistill.methods.sod import sod, turn_weights
from megatron_selfdistill.sources.signals import Signals

GAIN = 0.2


def signals(episodes, turns, lengths=None, hinted=None, mu=None, q=None) -> Signals:
    """Return signals of one group in which, unless given, every response has a hint and one token."""
    lengths = torch.tensor(lengths or [1] * len(turns))
    sampled = torch.tensor(mu or [-1.0] * int(lengths.sum()), dtype=torch.float64)
    return Signals(
        lengths=lengths,
        groups=torch.zeros(len(turns), dtype=torch.int64),
        rewards=torch.zeros(len(turns), dtype=torch.float64),
        hinted=torch.tensor(hinted or [True] * len(turns)),
        privileged=torch.zeros(len(turns), dtype=torch.bool),
        sampled_log_prob=sampled,
        target_log_prob=None if q is None else torch.tensor(q, dtype=torch.float64),
        episodes=torch.tensor(episodes),
        turns=torch.tensor(turns),
    )


def weights(episodes, turns, distances) -> list[float]:
    return turn_weights(signals(episodes, turns), torch.tensor(distances, dtype=torch.float64), GAIN).tolist()


def product_of_ratios(distances: list[float]) -> list[float]:
    """Return the weights by the published formula: a product over the earlier turns, bounded once at its end."""
    found, product = [1.0], 1.0
    for earlier, later in pairwise(distances):
        product *= (earlier + 1e-6) / (later + 1e-6)
        found.append(min(product, 1 + GAIN))
    return found


@pytest.mark.parametrize(
    "distances", [[0.0, 0.0, 3.0], [0.0, 1e-7, 1e-6, 1e-5], [5.0, 1e-9, 5.0], [2.0], [1e-3, 1e3, 1e-3, 1.0]]
)
def test_weights_are_the_product_of_the_ratios_of_all_earlier_turns(distances):
    found = weights([0] * len(distances), list(range(len(distances))), distances)
    assert found == pytest.approx(product_of_ratios(distances), rel=1e-12)


def test_weights_of_an_episode_depend_on_its_own_turns_alone_in_any_order():
    turns, distances = [2, 0, 0, 3, 1, 1], [0.05, 0.3, 0.10, 0.20, 0.40, 0.6]
    found = weights([1, 0, 1, 1, 1, 0], turns, distances)
    other = (0.3 + 1e-6) / (0.6 + 1e-6)
    own = product_of_ratios([0.10, 0.40, 0.05, 0.20])
    assert found == pytest.approx([own[2], 1.0, own[0], own[3], own[1], other], abs=1e-10)


def test_advantage_is_the_weighted_log_ratio_of_the_teacher():
    """Two turns of three and two tokens: their distances are .4 and .8, although their mean log-ratios are 0 and .2."""
    mu, q = [-1.0, -2.0, -0.5, -1.0, -3.0], [-1.6, -1.4, -0.5, -0.0, -3.6]
    found = sod(signals([0, 0], [0, 1], [3, 2], mu=mu, q=q), weight=0.5, gain=GAIN)
    second = 0.5 * (0.4 + 1e-6) / (0.8 + 1e-6)
    expected = [0.5 * -0.6, 0.5 * 0.6, 0.0, second * 1.0, second * -0.6]
    assert found.advantage.tolist() == pytest.approx(expected, abs=1e-12)
    assert not found.divergence.any() and not found.sampled_kl.any() and not found.likelihood.any()


def test_responses_without_a_hint_have_no_advantage_even_where_the_teacher_excludes_a_token():
    found = sod(
        signals([0, 0, 1], [0, 1, 0], hinted=[True, True, False], mu=[-1.0] * 3, q=[-2.0, -torch.inf, -4.0]),
        weight=1.0,
        gain=GAIN,
    )
    assert found.advantage.tolist() == [-1.0, 0.0, 0.0]
