# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of `selfdistill explore` on every rank: generate a response, read it with every model, write the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair, PromptPair, build_contexts, fit_teacher_prompt
from megatron_selfdistill.data.hints import check_student_prompt, check_teacher_prompt
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import broadcast_object
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.all_models import AllModels, load_chunks, read_by_all_models
from megatron_selfdistill.evaluation.inference import Inference, open_inference
from megatron_selfdistill.metrics.explored import ExploredResponse, cut
from megatron_selfdistill.report.target_page import write_target_page
from megatron_selfdistill.rollout.base import Request, Response, sample_seed
from megatron_selfdistill.run_data import RunData


@dataclass(frozen=True)
class Exploration:
    """One problem, its response where one is given, and the models that read the response."""

    config: Config
    """The configuration, whose ``checkpoint.load`` names the student."""
    run_data: RunData
    problem: Problem
    prompts: PromptPair
    response: Response | None
    """The given response; None where the student generates one."""
    teacher: str | None = None
    """The Megatron checkpoint of the teacher; None where the student is its own teacher."""
    reference: str | None = None
    """The Megatron checkpoint of a reference that is not the teacher; None where the teacher is also the reference."""

    @classmethod
    def of_problem(cls, config: Config, problem: Problem, text: str | None) -> Exploration:
        """Return the exploration of ``text``, or of a response that the student generates; it has no models yet.

        Raises: `ConfigError` for a problem that does not fit or that the prompts do not show.
        """
        run_data = RunData.of_problem(config, problem)
        response = None
        if text is not None:
            response = Response.unsampled([*run_data.tokenizer.encode(text), run_data.stop_token_ids[0]])
        try:
            prompts = fit_teacher_prompt(
                run_data.builder,
                problem,
                max_length=run_data.max_length,
                max_new_tokens=config.rollout.max_new_tokens if response is None else len(response.token_ids),
                policy="error",
            )
            assert prompts is not None, "the policy error returns prompts or raises"
            student, teacher = prompts.student_prompt, prompts.teacher_prompt
            check_student_prompt(run_data.builder, problem, student)
            check_teacher_prompt(run_data.builder, problem, student, teacher, problem.solution)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls(config, run_data, problem, prompts, response)

    def with_models(self, *, student: str, teacher: str | None, reference: str | None, run_dir: str) -> Exploration:
        """Return the exploration with the Megatron checkpoints of its models, and a directory for an engine's files."""
        checkpoint = replace(self.config.checkpoint, load=student)
        config = replace(self.config, checkpoint=checkpoint, run_dir=run_dir)
        return replace(self, config=config, teacher=teacher, reference=reference)

    def write_page(self, out: Path, grid: RankGrid, about: Mapping[str, Any]) -> str | None:
        """Write the page of the explored response, and return lines for the user on rank 0, None on other ranks.

        ``about``: further entries of the record.
        Every rank of the world calls this method.  Raises: `ConfigError`, `CheckpointError`, `EngineError`.
        """
        if self.response is None:
            with open_inference(self.config, self.run_data, grid) as inference:
                response = self._generated(inference, grid)
                inference.sampler.sleep()
                found = self._explored(self._contexts(response, grid), inference.chunks, grid)
        else:
            found = self._explored(
                self._contexts(self.response, grid), load_chunks(self.config, self.run_data, self._student, grid), grid
            )
        if not grid.is_reporter:
            return None
        (explored,) = found
        out.parent.mkdir(parents=True, exist_ok=True)
        write_target_page(explored.record(self.run_data.tokenizer, **about), out)
        return _summary(explored, out)

    def _generated(self, inference: Inference, grid: RankGrid) -> Response:
        """Return the student's response on every rank; the first replica generates it."""
        seed = sample_seed(self.config.seed, 0, self.problem.id, 0)
        requests = [Request(self.prompts.student_prompt, seed)] if grid.dp_rank == 0 else []
        responses = inference.sampler.generate(requests, inference.sampling)
        found: Sequence[Response] = broadcast_object(list(responses))
        return found[0]

    def _contexts(self, response: Response, grid: RankGrid) -> list[ContextPair]:
        """Return both contexts of the response on the first replica, and none on the others."""
        (context,) = build_contexts([self.prompts], [response])
        if not context.response:
            raise ConfigError("expected a response of at least one token, got none; give one with --response")
        return [cut(context)] if grid.dp_rank == 0 else []

    def _explored(
        self, contexts: Sequence[ContextPair], student: list[torch.nn.Module], grid: RankGrid
    ) -> list[ExploredResponse]:
        """Return the contexts of this replica, read by every model, on each of its ranks."""
        models = AllModels.load(self.config, self.run_data, grid, student, self.teacher, self.reference)
        solutions = [self.prompts.solution] * len(contexts)
        return read_by_all_models(self.config, self.run_data, models, contexts, solutions, grid)

    @property
    def _student(self) -> str:
        load = self.config.checkpoint.load
        assert load is not None, "with_models has set the checkpoint"
        return load


def _summary(explored: ExploredResponse, out: Path) -> str:
    losses, status = explored.numbers["loss"], explored.statuses
    text = ", ".join(f"{name.replace('_', ' ')} {status.count(name)}" for name in dict.fromkeys(status))
    mean = sum(losses) / len(losses)
    return (
        f"{len(losses)} tokens, mean {explored.settings.divergence.kind} {mean:.4g} nats per token; k: {text}\n"
        f"written to {out}: open it in a browser"
    )
