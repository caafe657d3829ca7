# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ages of the weights that sampled the tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.metrics.step import over_all_ranks
from megatron_selfdistill.rollout.base import Response


def staleness_metrics(responses: Sequence[Response], step: int, grid: RankGrid) -> dict[str, float]:
    """Return the ages of the tokens of the global batch's responses, in optimizer steps, equal on all ranks.

    ``responses``: those of this replica, the same on each of its ranks; a token of unknown weights is left out.
    ``step``: the number of optimizer steps of the student's present weights.
    No keys without a token.
    Collectives as in `over_all_ranks`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=grid.device)
    oldest = torch.zeros(1, dtype=torch.float64, device=grid.device)
    if grid.is_first_of_replica:
        ages = [step - version for one in responses for version in one.token_versions if version is not None]
        num_mixed = sum(len({version for version, _ in one.weight_spans}) > 1 for one in responses)
        sums += torch.tensor([len(ages), sum(ages), len(responses), num_mixed], dtype=torch.float64, device=grid.device)
        oldest += max(ages, default=0)
    (num_tokens, age, num_responses, mixed), (age_max,) = over_all_ranks(sums, oldest, grid)
    if not num_tokens:
        return {}
    return {
        "rollout/staleness_mean": age / num_tokens,
        "rollout/staleness_max": age_max,
        "rollout/mixed_share": mixed / num_responses,
    }
