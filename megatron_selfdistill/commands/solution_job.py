# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of `selfdistill solutions` on every rank: sample, verify and keep the best solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.commands.data_set_job import STEP, Lines, provenance_of, question_of
from megatron_selfdistill.commands.solution_journal import summarize
from megatron_selfdistill.config import Config, writable
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, decided_output_layer
from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
from megatron_selfdistill.loss.sharded.backend import in_use
from megatron_selfdistill.pipeline.score import ScoringModels, learnabilities, with_reference
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.solution_search import Attempt, Candidate, Score, Search, solve


@dataclass(frozen=True)
class SolutionWork:
    """The search for solutions to the problems of ``run_data``, on one rank: a `DataSetWork`."""

    config: Config
    run_data: RunData
    grid: RankGrid
    model: Path | None
    """The model that the provenance names; None stands for ``checkpoint.load``."""

    def provenance(self) -> dict[str, Any]:
        """Return everything that the solutions depend on, except the layout."""
        solutions = self.config.solutions
        wording = "tokenizer chat_template chat_template_kwargs system_prompt student_template".split()
        if solutions.pick == "learnable":
            wording += ["teacher_template", "on_long_context"]
        return {
            **provenance_of(self.config, self.run_data, self.model, wording),
            "verifier": writable(self.config)["evaluation"]["verifier"],
            "confidence": self.config.evaluation.confidence,
            **{name: value for name, value in asdict(solutions).items() if name != "refresh_every"},
        }

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise `ConfigError` for problems that cannot be verified or scored, and for an impossible loss.backend."""
        config = self.config
        try:
            check_answers(problems, load_verifier(config.evaluation.verifier))
            if config.solutions.pick == "learnable":
                for problem in problems:
                    with_reference(problem)
                dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
                in_use(config.loss.backend, self.grid.device, dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def opened(self, inference: Inference) -> Callable[[Sequence[Problem]], Lines]:
        """Return the function that solves a group of problems with the model of ``inference``.

        Raises: `ConfigError` if the model cannot have the configured ``loss.fused``.
        """
        score = self._scorer(inference) if self.config.solutions.pick == "learnable" else None
        return lambda group: self._solve(group, inference, score)

    def summarize(self, lines: Iterator[dict[str, Any]], out: Path) -> None:
        """Print the number of problems by their number of correct samples, and the number of solutions in ``out``."""
        summarize(lines, out, self.config.solutions.num_samples)

    def _solve(self, group: Sequence[Problem], inference: Inference, score: Score | None) -> Lines:
        solutions = self.config.solutions
        attempts = solve(
            group,
            Search(solutions.num_samples, solutions.keep, solutions.pick, self.config.seed),
            STEP,
            generate=lambda requests: inference.sampler.generate(requests, inference.sampling),
            builder=self.run_data.builder,
            verifier=load_verifier(self.config.evaluation.verifier),
            confidence=self.config.evaluation.confidence_pattern,
            grid=self.grid,
            score=score,
        )
        return [self._line(attempt) for attempt in attempts]

    def _scorer(self, inference: Inference) -> Score:
        """Return the function that scores the learnability of candidates; the model is student and teacher.

        Raises: `ConfigError` if the model cannot have the configured ``loss.fused``.
        """
        models = ScoringModels(
            student=inference.chunks,
            teacher=inference.chunks,
            grid=self.grid,
            vocab=inference.vocab,
            max_tokens=self.config.schedule.max_tokens,
            fusion=decided_output_layer(self.config, inference.chunks).fusion,
            backend=self.config.loss.backend,
        )
        return lambda candidates: learnabilities(candidates, models, self.config, self.run_data)

    def _line(self, attempt: Attempt) -> dict[str, Any]:
        """Return the journal's line of one problem."""
        problem, candidates = attempt.problem, attempt.candidates
        return {
            "problem_id": problem.id,
            **question_of(problem),
            "answer": problem.answer,
            "prompt": self.run_data.tokenizer.decode(self.run_data.builder.student_prompt(problem)),
            "num_correct": sum(candidate.correct for candidate in candidates),
            "verdicts": [candidate.correct for candidate in candidates],
            "lengths": [len(candidate.response.token_ids) for candidate in candidates],
            "truncated": [candidate.response.truncated for candidate in candidates],
            "solutions": [_solution(candidate) for candidate in attempt.kept],
        }


def _solution(candidate: Candidate) -> dict[str, Any]:
    return {
        "sample": candidate.sample,
        "solution": candidate.text,
        "num_tokens": len(candidate.response.token_ids),
        "mean_log_prob": candidate.mean_log_prob,
        "learnability": candidate.score,
    }
