# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of `selfdistill explore` on every rank: generate a response, read it with every model, write the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.checkpoint.trained_weights import loaded_chunks
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.controls import Controls, num_controls
from megatron_selfdistill.data.given_solutions import GivenSolutions, build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_checks import check_student_prompt, check_teacher_prompt
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import broadcast_object
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, open_inference
from megatron_selfdistill.instruments.explorer.explored import ExploredResponse, TokenTarget, cut, explored_responses
from megatron_selfdistill.instruments.explorer.given_models import ModelCheckpoints
from megatron_selfdistill.instruments.explorer.target_page import target_page
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics.run_log import replace_file
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.output_layer import decided_output_layer
from megatron_selfdistill.pipeline import token_losses
from megatron_selfdistill.pipeline.schedule import Reference
from megatron_selfdistill.pipeline.score import ScoringModels, read, sequence_for
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed


@dataclass(frozen=True)
class Exploration:
    """One problem, and its response if one is given."""

    config: Config
    run_data: RunData
    prompts: PromptPair
    response: Response | None
    """The given response; None if the student generates one."""
    control_prompts: tuple[list[int], ...] = ()
    """The teacher's prompts with the hints of other problems, for a target with controls."""

    @classmethod
    def of_problem(cls, config: Config, problem: Problem, text: str | None) -> Exploration:
        """Return the exploration of ``text``, or of a response that the student generates.

        The controls have the hints of ``evaluation.path``, if it is set.
        Raises: `ConfigError` for a problem that does not fit or that the prompts do not show.
        """
        if not isinstance(config.target.anchor, str):
            raise ConfigError("the page shows anchors that are one model: set target.anchor to reference or student")
        others = [] if config.evaluation.path is None else RunData.load_evaluation(config, True).evaluation
        number = num_controls(config, [problem, *others])
        run_data = replace(RunData.of_problem(config, problem), num_controls=number)
        response = None
        if text is not None:
            response = Response.unsampled([*run_data.tokenizer.encode(text), run_data.stop_token_ids[0]])
        new = config.rollout.max_new_tokens if response is None else len(response.token_ids)
        given = GivenSolutions(run_data.builder, run_data.max_length, new, "error")
        try:
            prompts = given.pair(problem)
            student, teacher = prompts.student_prompt, prompts.teacher_prompt
            check_student_prompt(run_data.builder, problem, student)
            check_teacher_prompt(run_data.builder, problem, student, teacher, problem.solution)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        controls = Controls(others, given, number, config.seed)
        return cls(config, run_data, prompts, response, controls.prompts(0, problem) if number else ())

    def write_page(
        self, out: Path, models: ModelCheckpoints, run_dir: Path, grid: RankGrid, about: Mapping[str, Any]
    ) -> str | None:
        """Write the page of the explored response, and return lines for the user on rank 0, None on other ranks.

        ``run_dir``: a directory for an engine's files.  ``about``: further entries of the record.
        Every rank of the world calls this method.  Raises: `ConfigError`, `CheckpointError`, `EngineError`.
        """
        checkpoint = replace(self.config.checkpoint, load=models.student)
        config, response = replace(self.config, checkpoint=checkpoint, run_dir=str(run_dir)), self.response
        if response is None:
            with open_inference(config, self.run_data, grid) as inference:
                response = self._generated(inference, grid)
                inference.sampler.sleep()
                found = self._explored(response, inference.chunks, models, grid)
        else:
            chunks = loaded_chunks(config, grid, self.run_data.vocab_size, models.student)
            found = self._explored(response, chunks, models, grid)
        if not grid.is_reporter:
            return None
        (explored,) = found
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, target_page(explored.record(self.run_data.tokenizer, **about)))
        return _summary(explored, out)

    def _generated(self, inference: Inference, grid: RankGrid) -> Response:
        """Return the student's response on every rank; the first replica generates it."""
        seed = sample_seed(self.config.seed, 0, self.prompts.problem_id, 0)
        requests = [Request(self.prompts.student_prompt, seed)] if grid.dp_rank == 0 else []
        responses = inference.sampler.generate(requests, inference.sampling)
        found: Sequence[Response] = broadcast_object(list(responses))
        return found[0]

    def _explored(
        self, response: Response, student: list[torch.nn.Module], models: ModelCheckpoints, grid: RankGrid
    ) -> list[ExploredResponse]:
        """Return the response as every model reads it, on each rank of the first replica, and nothing on the others."""
        (context,) = build_contexts([self.prompts], [response])
        if not context.response:
            raise ConfigError("expected a response of at least one token, got none; give one with --response")
        context = replace(cut(context), control_prompts=self.control_prompts)
        contexts = [context] if grid.dp_rank == 0 else []
        every = AllModels.load(self.config, self.run_data, grid, student, models.teacher, models.reference)
        solutions = [self.prompts.solution] * len(contexts)
        return read_by_all_models(self.config, self.run_data, every, contexts, solutions, grid)


def _summary(explored: ExploredResponse, out: Path) -> str:
    losses, status = explored.numbers["loss"], explored.statuses
    text = ", ".join(f"{name.replace('_', ' ')} {status.count(name)}" for name in dict.fromkeys(status))
    mean = sum(losses) / len(losses)
    return (
        f"{len(losses)} tokens, mean {explored.settings.divergence.kind}: {mean:.4g} nats per token; k: {text}\n"
        f"written to {out}: open it in a browser"
    )


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

        ``student``: the chunks of the student.  ``teacher``: None if the teacher has the student's weights.
        ``reference``: None if the reference has the teacher's weights.
        Every rank of the world calls this method.  Raises: `CheckpointError`.
        """
        size = run_data.vocab_size
        own = student if teacher is None else loaded_chunks(config, grid, size, teacher)
        if not Target.configured(config.target).is_anchored:
            return cls(student, own, None)
        return cls(student, own, own if reference is None else loaded_chunks(config, grid, size, reference))


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
    target = Target.configured(config.target, num_controls=run_data.num_controls)
    settings = TokenTarget(target, Divergence.configured(config.loss, config.method))
    backend, chunk_tokens = config.loss.backend, config.loss.fused_chunk_tokens
    fusion = decided_output_layer(config, models.student).fusion
    loss = token_losses.self_distillation(settings.target, settings.divergence, backend, fusion=fusion)
    reference = None
    if models.reference is not None:
        reference = Reference(settings.target, models.reference, chunk_tokens, backend)
    readers = ScoringModels(
        student=models.student,
        teacher=models.teacher,
        grid=grid,
        vocab=VocabShard.from_group(unwrapped(models.student[-1]).vocab_size, run_data.vocab_size, grid.tp_group),
        max_tokens=sequence_for(run_data.max_length, grid),
        reference=reference,
    )
    measurement = TokenMeasurement(settings.target, chunk_tokens, backend, summarise=settings.summarise)
    output = read(contexts, readers, loss, measurement).output
    if not contexts:
        return []
    return explored_responses(output, contexts, solutions, settings, run_data.vocab_size, grid)
