# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ages of tokens count once per replica, and tokens of unknown weights do not count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest

from megatron_selfdistill.rollout.base import Response

RESPONSES = [
    replace(Response.unsampled([1, 2]), weight_version=5),
    replace(Response.unsampled([1, 2, 3, 4]), weight_version=3, weight_spans=[(3, 3), (5, 1)]),
    Response.unsampled([1, 2, 3]),
    replace(Response.unsampled([1]), weight_version=4),
]


def measured(layout: dict[str, int], responses: list[Response]) -> dict[str, float]:
    from megatron_selfdistill.metrics.staleness import staleness_metrics

    _, grid = models.build(models.model_config("gqa", num_layers=2), models.parallel(**layout))
    return staleness_metrics(responses[grid.dp_rank :: grid.dp_size], 5, grid)


@pytest.mark.parametrize(("layout", "world_size"), [({}, 1), ({}, 2), ({"tp": 2}, 2)], ids=["one", "DP2", "TP2"])
def test_ages_are_means_over_the_tokens_of_known_weights(ranks: Any, layout: dict[str, int], world_size: int) -> None:
    found = ranks.run(measured, layout, RESPONSES, world_size=world_size)
    expected = {
        "rollout/staleness_mean": (3 * 2 + 1) / 7,
        "rollout/staleness_max": 2.0,
        "rollout/mixed_share": 1 / 4,
    }
    assert found == [expected] * world_size
    assert ranks.run(measured, layout, RESPONSES[2:3] * 2, world_size=world_size) == [{}] * world_size
