# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reading of responses by student, teacher and reference, without training: the target of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.inference import decided_output_layer, loaded_chunks
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.metrics.explored import ExploredResponse, TokenTarget, explored_responses
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.pipeline.reference import Reference
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement
from megatron_selfdistill.rollout.factory import configured_target
from megatron_selfdistill.run_data import RunData


@dataclass(frozen=True)
class AllModels:
    """This rank's chunks of the models that read a response; two models may share their chunks."""

    student: list[torch.nn.Module]
    teacher: list[torch.nn.Module]
    reference: list[torch.nn.Module] | None
    """The chunks of the reference; None for a target that is not anchored."""

    @classmethod
    def load(
        cls,
        config: Config,
        run_data: RunData,
        grid: RankGrid,
        student: list[torch.nn.Module],
        teacher: str | None,
        reference: str | None,
    ) -> AllModels:
        """Return the models with the weights of Megatron checkpoints.

        ``student``: the chunks of the student.  ``teacher``: None where the teacher has the student's weights.
        ``reference``: None where the reference has the teacher's weights.
        Every rank of the world calls this method.  Raises: `CheckpointError`.
        """
        own = student if teacher is None else load_chunks(config, run_data, teacher, grid)
        if not configured_target(config.target).is_anchored:
            return cls(student, own, None)
        return cls(student, own, own if reference is None else load_chunks(config, run_data, reference, grid))


def load_chunks(config: Config, run_data: RunData, checkpoint: str, grid: RankGrid) -> list[torch.nn.Module]:
    """Return this rank's chunks of the model with the weights of a Megatron checkpoint.  Raises: `CheckpointError`."""
    return loaded_chunks(config, grid, run_data.vocab_size, checkpoint)


def read_by_all_models(
    config: Config,
    run_data: RunData,
    models: AllModels,
    contexts: Sequence[ContextPair],
    solutions: Sequence[str],
    grid: RankGrid,
) -> list[ExploredResponse]:
    """Return this replica's ``contexts``, read by every model under the configured target, on each of its ranks.

    ``solutions``: the solution that the teacher's prompt of each context shows.
    Every rank of the world calls this function; at least one replica has a context with a response token.
    """
    settings = TokenTarget(configured_target(config.target), Divergence(config.loss.divergence, config.loss.jsd_lambda))
    backend, chunk_tokens = config.loss.backend, config.loss.fused_chunk_tokens
    fusion = decided_output_layer(config, models.student).fusion
    loss = token_losses.self_distillation(settings.target, settings.divergence, backend, fusion=fusion)
    reference = None
    if models.reference is not None:
        reference = Reference(settings.target, models.reference, chunk_tokens, backend)
    # Alternating, so that the states of only one packed sequence are kept.
    order = "alternating"
    packing = Packing.of_model(
        unwrapped(models.student[0]).config,
        max_tokens=_longest_sequence(run_data, grid),
        pair_order=order,
        with_teacher=True,
        with_reference=reference is not None,
    )
    batch = pack_everywhere(contexts, packing, grid)
    output = schedule.run(
        models.student,
        models.teacher,
        batch,
        loss,
        grid,
        VocabShard.from_group(unwrapped(models.student[-1]).vocab_size, run_data.vocab_size, grid.tp_group),
        reference=reference,
        measurement=TokenMeasurement(settings.target, chunk_tokens, backend, summarises=True),
        pair_order=order,
        forward_only=True,
    )
    if not contexts:
        return []
    return explored_responses(output, contexts, solutions, [settings] * len(contexts), run_data.vocab_size, grid)


def _longest_sequence(run_data: RunData, grid: RankGrid) -> int:
    """Return a length of packed sequences that holds every context and that the layout can cut."""
    multiple = 16 * grid.tp_size * 2 * grid.cp_size
    return -(-run_data.max_length // multiple) * multiple
