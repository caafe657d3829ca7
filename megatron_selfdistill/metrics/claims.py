# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The numbers behind the method's claims: rare tokens, fork tokens, and the divergence by position in a response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats
from megatron_selfdistill.loss.status import Status

if TYPE_CHECKING:  # the metrics of a run are also read without Megatron
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.pipeline.token_measures import TokenMeasures

FORKS_ARE_ONE_IN = 10
"""The forks are one in this number of tokens: those at which the anchor is least certain."""
FORK_RESOLUTION = 0.02
"""The relative width of the bins of entropy, one of whose edges separates the forks from the other tokens."""
FORK_RANGE = 2.0**-20, 2.0**4
"""The lower edge of the second bin, and the upper edge of the last bin but one, in nats; the first bin begins at 0."""
TENTHS = tuple(f"tenth_{number:02d}" for number in range(1, 11))
"""The names of the ten parts of a response."""

_NUM_BINS = 2 + math.ceil(math.log(FORK_RANGE[1] / FORK_RANGE[0]) / math.log1p(FORK_RESOLUTION))


@dataclass(frozen=True)
class Forks:
    """The fork tokens among R tokens."""

    mask: Tensor
    """Whether a token is a fork, [R] bool; False for an unknown entropy."""
    entropy_at_least: Tensor
    """The smallest entropy of a fork in nats, an edge of a bin; a float64 scalar, equal on all ranks."""


def find_forks(entropy: Tensor | None, grid: RankGrid) -> Forks | None:
    """Return the fork tokens: the tenth of the tokens of the global batch with the largest ``entropy``.

    ``entropy [R]``: nats, of this rank's tokens.  It is None where the rank's tokens do not count or their entropy is
    unknown, and then the result is None.  Tokens whose entropy is not finite are ignored.
    The forks are the tokens from an edge of a bin on, the largest edge that at least a tenth of the tokens reach, so
    that all tokens of one bin are forks or none is.  The choice does not depend on the layout.
    Collectives: a sum of 850 counts over the world.
    """
    counts = torch.zeros(_NUM_BINS, dtype=torch.float64, device=grid.device)
    if entropy is not None:
        entropy = entropy.double()
        known = torch.isfinite(entropy)
        bins = 1 + (torch.where(known, entropy, 0.0) / FORK_RANGE[0]).log().div(math.log1p(FORK_RESOLUTION)).floor()
        bins = bins.clamp(0, _NUM_BINS - 1).long()
        counts.index_add_(0, bins, known.double())
    if grid.world_size > 1:
        dist.all_reduce(counts)  # sums of integers, which are equal on all ranks
    if entropy is None:
        return None
    reached = counts.flip(0).cumsum(0).flip(0)
    first = (reached >= (reached[0] / FORKS_ARE_ONE_IN).ceil()).sum() - 1
    edge = FORK_RANGE[0] * (1 + FORK_RESOLUTION) ** (first - 1).double()
    return Forks(known & (bins >= first), torch.where(first > 0, edge, 0.0))


def fork_values(stats: TokenStats, forks: Forks) -> dict[str, Tensor]:
    """Return the summands [R] float64 of the means over the forks, and under "forks" the forks that they divide by."""
    values = {
        "forks": torch.ones_like(forks.mask),
        "forks/entropy_student": stats.student_entropy,
        "forks/entropy_target": stats.target_entropy,
        "forks/capped": stats.status == Status.CAPPED,
    }
    return {key: torch.where(forks.mask, value.double(), 0.0) for key, value in values.items()}


def rare_values(measures: TokenMeasures | None) -> dict[str, Tensor]:
    """Return the summands [R] float64 of the masses on rare tokens, with the counts of the tokens that have them."""
    if measures is None:
        return {}
    student, reference = measures.mass_on_rare_student, measures.mass_on_rare_reference
    values = {"with_measures": torch.ones_like(student), "target/mass_on_rare_student": student}
    if reference is not None:
        values |= {"with_reference": torch.ones_like(reference), "target/mass_on_rare_reference": reference}
    return values


def response_tenths(lengths: Sequence[int]) -> Tensor:
    """Return the tenth of its response in which each token lies, from 0 to 9, [sum of lengths] int64 on the host.

    Token i of a response of n tokens, counted from 0, lies in tenth floor(10 i / n), so a response of fewer than ten
    tokens leaves some tenths empty.
    """
    tenths = [torch.arange(length) * len(TENTHS) // length for length in lengths if length]
    return torch.cat(tenths) if tenths else torch.empty(0, dtype=torch.int64)


def tenth_values(stats: TokenStats, tenths: Tensor) -> dict[str, Tensor]:
    """Return the summands [R] float64 of the reverse KL in each tenth, with the counts; ``tenths [R]`` from 0 on."""
    values: dict[str, Tensor] = {}
    for number, tenth in enumerate(TENTHS):
        here = tenths == number
        values |= {tenth: here.double(), f"reverse_kl/{tenth}": torch.where(here, stats.reverse_kl.double(), 0.0)}
    return values
