# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pass in which a teacher reads a batch before the student: its final hidden states, by a schedule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.distributed.host_to_device import to_device_in_one_copy
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.model.forward import unwrapped, uses_local_attention
from megatron_selfdistill.pipeline.batch import DeviceBatch, held_by, teacher_microbatches
from megatron_selfdistill.pipeline.joined_batches import weights_unchanged
from megatron_selfdistill.pipeline.next_token import next_token
from megatron_selfdistill.pipeline.schedule import ScheduledStep, ScheduledTeacher, TeacherHiddenStates
from megatron_selfdistill.pipeline.token_losses import GuidedTokens


def read_states(
    student: Sequence[torch.nn.Module],
    teacher: Sequence[torch.nn.Module],
    batch: PackedBatch,
    reading: PackedBatch,
    grid: RankGrid,
    vocab: VocabShard,
    *,
    store_bytes: float = float("inf"),
) -> TeacherHiddenStates:
    """Return the final hidden states of ``teacher`` at the response tokens of ``batch``, on the last stage.

    ``reading``: the same responses after the teacher's prompts, as the microbatches of a student.  Nothing is trained,
    and the gradients of a step that is under way stay.  ``student``: the chunks that the schedule knows, whose states
    have the shapes of those of ``teacher``.
    Collectives: those of the schedule.
    """
    microbatches = teacher_microbatches(
        batch, replace(reading, teacher=reading.student), grid, uses_local_attention(student)
    )
    sizes = [len(held_by(microbatch, batch.guided, grid.cp_size, grid.cp_rank)[1]) for microbatch in batch.student]
    on_device = to_device_in_one_copy(DeviceBatch([], microbatches, sizes), grid.device)
    states = TeacherHiddenStates(on_device, grid, unwrapped(teacher[0]).config.hidden_size, store_bytes)
    step = ScheduledStep(
        student=list(student),
        teacher=ScheduledTeacher(teacher),
        batch=on_device,
        token_loss=next_token,
        reference=None,
        guided=GuidedTokens(),
        measurement=None,
        token_coefficients=None,
        grid=grid,
        vocab=vocab,
        loss_scale=1.0,
        states=states,
    )
    with weights_unchanged(student):
        step.run([("teacher", i) for i in range(len(on_device.teacher))], reading.seq_length, forward_only=True)
    return states
