# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a step of several partial batches has: gradients that add up, and one output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline.partial_batches import Accumulated, PartialBatch
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.pipeline.token_measures import TokenMeasures


@contextlib.contextmanager
def gradients_of(partial_batch: PartialBatch, accumulated: Accumulated, chunks: Sequence[Any]) -> Iterator[None]:
    """Let a call of the schedule add the gradients of ``partial_batch``; leave the schedule's configuration as it was.

    ``chunks``: this rank's chunks of the student, in Megatron's DDP.
    The first microbatch of a later partial batch is not the first one after a change of the weights: with FP8,
    Transformer Engine would overwrite the earlier gradients with those of that microbatch.
    In the last partial batch, the earlier gradients are first divided by the same number as those of this one.
    In another partial batch, nothing is reduced over data-parallel ranks and nothing is finalised.
    """
    with contextlib.ExitStack() as stack:
        if partial_batch.earlier is not None:
            stack.enter_context(weights_unchanged(chunks))
        if partial_batch.is_last:
            if partial_batch.earlier is not None and partial_batch.earlier.divisor != accumulated.divisor:
                for chunk in chunks:
                    chunk.scale_gradients(partial_batch.earlier.divisor / accumulated.divisor)
            yield
            return
        config = unwrapped(chunks[0]).config
        before = config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func
        for chunk in chunks:  # once around the whole call: the exit of DDP's context switches the reduction on
            stack.enter_context(chunk.no_sync())
        # The schedule drains deferred gradients of the output layer only where it has a function that finalises.
        config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func = None, None, _finalise_nothing
        try:
            yield
        finally:
            config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func = before


@contextlib.contextmanager
def weights_unchanged(chunks: Sequence[Any]) -> Iterator[None]:
    """Keep a call of the schedule from marking its first microbatch, as Megatron Core's schedules do in every call.

    Layers with this mark quantise their weights anew and overwrite ``main_grad``, as they must once in a step.
    """
    for chunk in chunks:
        chunk.set_is_first_microbatch = lambda: None
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.set_is_first_microbatch


def _finalise_nothing(*args: object, **kwargs: object) -> None:
    """Leave the gradients as they are."""


def joined_output(parts: Sequence[StepOutput], lengths: Sequence[int]) -> StepOutput:
    """Return the results of all ``parts``, the partial batches of a step, as those of one batch, in order.

    ``lengths``: the number of response tokens of this replica in each partial batch, by which ``response_ids``
    count on.
    """
    starts = [sum(lengths[:i]) for i in range(len(parts))]
    stats = [part.stats for part in parts if part.stats is not None]
    coefficients = [part.coefficients for part in parts if part.coefficients is not None]
    measures = [part.measures for part in parts if part.measures is not None]
    entropies = [part.anchor_entropy for part in parts if part.anchor_entropy is not None]
    return StepOutput(
        num_response_tokens=sum(part.num_response_tokens for part in parts),
        response_ids=torch.cat([part.response_ids + start for part, start in zip(parts, starts, strict=True)]),
        stats=TokenStats.concatenate(stats) if stats else None,
        coefficients=Coefficients.concatenate(coefficients) if coefficients else None,
        measures_teacher=all(part.measures_teacher for part in parts),
        measures=TokenMeasures.concatenate(measures) if measures else None,
        anchor_entropy=torch.cat(entropies) if entropies else None,
        accumulated=parts[-1].accumulated,
    )
