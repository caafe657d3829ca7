# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of `selfdistill solutions` on every rank: sample, verify, keep the best, and write the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_selfdistill.checkpoint.directory import find, iteration_of
from megatron_selfdistill.commands.solution_journal import Journal, summarize
from megatron_selfdistill.config import Config, writable
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import gather_items, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, decided_output_layer, open_inference
from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
from megatron_selfdistill.loss.sharded.backend import in_use
from megatron_selfdistill.pipeline.score import ScoringModels, learnabilities, with_reference
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.solution_search import Attempt, Candidate, Score, Search, solve

_STEP = 0  # the model is not trained here, so every sample belongs to step 0


@dataclass(frozen=True)
class SolutionJob:
    """The search for solutions to all problems of ``run_data``, on one rank."""

    config: Config
    """The configuration, whose ``checkpoint.load`` names the model."""
    run_data: RunData
    grid: RankGrid
    out: Path
    """The file that receives the solutions."""
    group_size: int
    """The number of problems that are solved, and saved in the journal, at a time."""
    model: Path | None
    """The model that the provenance names; None stands for ``checkpoint.load``."""

    def run(self) -> None:
        """Solve the problems that the journal lacks, then write the file of solutions and print a summary.

        Every rank of the world calls this method; rank 0 writes and prints.  Raises: `ConfigError`, `CheckpointError`.
        """
        problems = self.run_data.problems.problems
        self._check(problems)
        journal = Journal(self.out, self.provenance(), self.group_size)
        done = run_on_rank_0(lambda: journal.begin(len(problems)))
        if done < len(problems):
            with open_inference(self.config, self.run_data, self.grid) as inference:
                self._solve(problems, done, inference, journal)
        run_on_rank_0(lambda: journal.finish({problem.id for problem in problems}))
        if self.grid.is_reporter:
            summarize(journal.lines(), self.out, self.config.solutions.num_samples)

    def provenance(self) -> dict[str, Any]:
        """Return everything that the solutions depend on, except the layout."""
        config = self.config
        assert config.checkpoint.load is not None
        path, _ = find(Path(config.checkpoint.load))
        rollout, solutions, plain = config.rollout, config.solutions, writable(config)
        sampling = {name: getattr(rollout, name) for name in "engine max_new_tokens temperature top_k top_p".split()}
        wording = "tokenizer chat_template chat_template_kwargs system_prompt student_template".split()
        if solutions.pick == "learnable":
            wording += ["teacher_template", "on_long_context"]
        return {
            "model": str((self.model or path).absolute()),
            "iteration": iteration_of(path),
            "data": self.run_data.problems.fingerprint,
            "seed": config.seed,
            "sampling": {**sampling, "stop_token_ids": list(self.run_data.stop_token_ids)},
            "prompts": {name: plain["data"][name] for name in wording},
            "verifier": plain["evaluation"]["verifier"],
            **{name: value for name, value in asdict(solutions).items() if name != "refresh_every"},
            "group_size": self.group_size,
        }

    def _check(self, problems: Sequence[Problem]) -> None:
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

    def _solve(self, problems: Sequence[Problem], done: int, inference: Inference, journal: Journal) -> None:
        score = self._scorer(inference) if self.config.solutions.pick == "learnable" else None
        with _progress_bar(len(problems), done, is_shown=self.grid.is_reporter) as advance:
            for start in range(done, len(problems), self.group_size):
                lines = self._solve_group(problems[start : start + self.group_size], inference, score)
                run_on_rank_0(lambda lines=lines: journal.append(lines))  # type: ignore[misc]
                advance(len(lines))

    def _solve_group(self, group: Sequence[Problem], inference: Inference, score: Score | None) -> list[dict[str, Any]]:
        """Return the journal's lines of the problems ``group`` of all replicas, in their order, on every rank."""
        solutions = self.config.solutions
        try:
            attempts = solve(
                group,
                Search(solutions.num_samples, solutions.keep, solutions.pick, self.config.seed),
                _STEP,
                generate=lambda requests: inference.sampler.generate(requests, inference.sampling),
                builder=self.run_data.builder,
                verifier=load_verifier(self.config.evaluation.verifier),
                grid=self.grid,
                score=score,
            )
        except RuntimeError as error:  # the verifier or an engine failed: the groups in the journal are kept
            raise ConfigError(f"{error}; after a fix, the same command continues from here") from error
        own = [self._line(attempt) for attempt in attempts]
        by_id = {line["problem_id"]: line for line in gather_items(own, self.grid.dp_group)}
        return [by_id[problem.id] for problem in group]

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
        messages = list(problem.messages)
        is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "user"
        question = {"problem": messages[0]["content"]} if is_text else {"messages": messages}
        return {
            "problem_id": problem.id,
            **question,
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


@contextmanager
def _progress_bar(total: int, done: int, *, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar with the number of problems and the remaining time, if ``is_shown`` and stderr is a terminal.

    The value of the context advances the bar by a number of problems.
    """
    console = Console(stderr=True)
    columns = (TextColumn("problems"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda number: bar.advance(task, number)
