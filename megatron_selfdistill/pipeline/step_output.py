# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The results of a step, or of one wave of a step, on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.pipeline.token_measures import TokenMeasures
from megatron_selfdistill.pipeline.waves import Accumulated


@dataclass
class StepOutput:
    """The results of one step on this rank, for the R response tokens that this rank's student held.

    Only the last pipeline stage has response tokens: the same on its tensor-parallel ranks, and split over its
    context-parallel ranks.
    """

    num_response_tokens: int
    """Number of response tokens of the global batch in this output's waves; equal on all ranks."""
    response_ids: Tensor
    """Index of each of the R tokens in ``PackedBatch.response_tokens``, [R] int64 on the device."""
    stats: TokenStats | None
    """Statistics of the R tokens, detached, the loss without coefficients; None on the other stages."""
    coefficients: Coefficients | None = None
    """Coefficients of the R tokens; None where the loss of every token is its divergence."""
    measures_teacher: bool = True
    """Whether ``stats`` describe the teacher; False on a step with a `Reference` that does not measure the teacher."""
    measures: TokenMeasures | None = None
    """Further measures of the R tokens; None without a `TokenMeasurement`, and on the other stages."""
    anchor_entropy: Tensor | None = None
    """Entropy [R] in nats of the target's anchor, student or reference; None where it is unknown."""
    accumulated: Accumulated | None = None
    """The gradients of the step up to this output; None where the output is not that of a call of the schedule."""

    @classmethod
    def joined(cls, waves: Sequence[StepOutput], lengths: Sequence[int]) -> StepOutput:
        """Return the results of all ``waves`` of a step as those of one wave that has all their tokens, in order.

        ``lengths``: the number of response tokens of this replica in each wave, by which ``response_ids`` count on.
        """
        if len(waves) == 1:
            return waves[0]
        starts = [sum(lengths[:i]) for i in range(len(waves))]
        stats = [wave.stats for wave in waves if wave.stats is not None]
        coefficients = [wave.coefficients for wave in waves if wave.coefficients is not None]
        measures = [wave.measures for wave in waves if wave.measures is not None]
        entropies = [wave.anchor_entropy for wave in waves if wave.anchor_entropy is not None]
        return cls(
            num_response_tokens=sum(wave.num_response_tokens for wave in waves),
            response_ids=torch.cat([wave.response_ids + start for wave, start in zip(waves, starts, strict=True)]),
            stats=TokenStats.concatenate(stats) if stats else None,
            coefficients=Coefficients.concatenate(coefficients) if coefficients else None,
            measures_teacher=all(wave.measures_teacher for wave in waves),
            measures=TokenMeasures.concatenate(measures) if measures else None,
            anchor_entropy=torch.cat(entropies) if entropies else None,
            accumulated=waves[-1].accumulated,
        )
