# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The batches of a step whose gradients are in ``main_grad``: one, or a wave after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from megatron_selfdistill.data.packing import PackedBatch
from megatron_selfdistill.pipeline.step_output import StepOutput
from megatron_selfdistill.pipeline.waves import Wave
from megatron_selfdistill.sources.source import StepBatch


class TrainedBatch(NamedTuple):
    """A batch whose gradients are in ``main_grad``: the whole step, or one wave of it."""

    batch: StepBatch
    packed: PackedBatch
    output: StepOutput | None
    """The statistics of its tokens; None where no replica had a response to train on."""


TrainedStep: TypeAlias = Sequence[TrainedBatch]
"""The batches of a step so far, in order."""


def wave_of(batch: StepBatch, earlier: TrainedStep) -> Wave:
    """Return the place of ``batch`` in its step, after the ``earlier`` batches."""
    outputs = [trained.output for trained in earlier if trained.output is not None]
    return Wave(outputs[-1].accumulated if outputs else None, batch.share, batch.ends_step)


def joined(step: TrainedStep) -> tuple[StepBatch, StepOutput | None]:
    """Return all batches of a step as one, and their statistics; no statistics where nothing was trained on."""
    batch = StepBatch.joined([trained.batch for trained in step])
    used = [(trained.output, len(trained.packed.response_tokens)) for trained in step if trained.output is not None]
    if not used:
        return batch, None
    return batch, StepOutput.joined([output for output, _ in used], [num_tokens for _, num_tokens in used])
