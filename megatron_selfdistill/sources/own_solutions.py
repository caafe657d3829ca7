# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Own solutions in the teacher's prompts: the table of a run, and prompts that show a solution from the table."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.evaluation.verify import Verifier
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Sampler, SamplingParams, response_text
from megatron_selfdistill.sources.problem_prompts import Answer, GivenSolutions, Prompts, UnguidedPrompts
from megatron_selfdistill.sources.solution_search import Score, Search, content_of, solve

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass(frozen=True)
class Solution:
    """A verified response of the model, as the table of a run keeps it."""

    text: str
    """The response without special tokens and without its stop token."""
    length: int
    """Tokens of the response as it was sampled."""
    step: int
    """Optimizer steps done when the response was sampled."""


@dataclass(frozen=True)
class OwnSolutions:
    """The solutions that a run has found for its problems, and when the next search is due.

    The table is a value, the same on every rank of the world: `refreshed` returns another one.
    """

    search: Search
    refresh_every: int
    """Steps between two searches."""
    table: Mapping[str, Sequence[Solution]] = field(default_factory=dict)
    """Problem id -> its solutions, best first."""
    refreshed_at: int | None = None
    """The step of the last search; None before the first."""

    def due(self, step: int) -> bool:
        """Return whether a search is due before the step that ``step`` optimizer steps precede."""
        return self.refreshed_at is None or step >= self.refreshed_at + self.refresh_every

    def refreshed(
        self, step: int, problems: Sequence[Problem], group_size: int, *, grid: RankGrid, **tools: Any
    ) -> tuple[OwnSolutions, dict[str, float]]:
        """Return the table after a search for solutions of ``problems``, and the metrics of the search.

        The search runs ``group_size`` problems at a time with the present weights.  The new solutions of a problem come
        first; older solutions, which are still right, fill the rest of ``search.keep``.  Other problems keep their
        solutions.  ``tools``: generate, builder, verifier, confidence, score, fits as `solve` takes them.

        The metrics, equal on all ranks: solutions/problems, solutions/pass_rate (right / sampled),
        solutions/solved_share (with a right sample in this search), solutions/available_share (with a solution in the
        table), solutions/length_mean (tokens of the solutions in the table).

        Collectives: per group the collectives of `solve`, and an all_gather_object over the data-parallel ranks.
        """
        num_right = num_sampled = num_solved = 0
        table = dict(self.table)
        for start in range(0, len(problems), group_size):
            attempts = solve(problems[start : start + group_size], self.search, step, grid=grid, **tools)
            found = [
                (
                    attempt.problem.id,
                    sum(candidate.correct for candidate in attempt.candidates),
                    [Solution(c.text, len(c.response.token_ids), step) for c in attempt.kept],
                )
                for attempt in attempts
            ]
            for problem_id, right, solutions in gather_items(found, grid.dp_group):
                num_sampled += self.search.num_samples
                num_right += right
                num_solved += right > 0
                table[problem_id] = self._distinct((*solutions, *table.get(problem_id, ())))
        available = [table[problem.id] for problem in problems if table.get(problem.id)]
        lengths = [solution.length for solutions in available for solution in solutions]
        return replace(self, table=table, refreshed_at=step), {
            "solutions/problems": float(len(problems)),
            "solutions/pass_rate": num_right / max(num_sampled, 1),
            "solutions/solved_share": num_solved / max(len(problems), 1),
            "solutions/available_share": len(available) / max(len(problems), 1),
            "solutions/length_mean": sum(lengths) / max(len(lengths), 1),
        }

    def solution_for(self, problem_id: str, response: str | None = None) -> Solution | None:
        """Return the best solution kept for a problem that is not the response itself; None where there is none.

        ``response``: its text (`response_text`).  A solution with that content (`content_of`) is the same sample or its
        twin: the teacher's prompt would show the response itself as a hint.
        """
        solutions = self.table.get(problem_id, ())
        if response is None or not solutions:
            return next(iter(solutions), None)
        own = content_of(response)
        return next((solution for solution in solutions if content_of(solution.text) != own), None)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the table, and the step of the last search."""
        table = {problem_id: [asdict(s) for s in solutions] for problem_id, solutions in self.table.items()}
        return {"table": table, "refreshed": self.refreshed_at}

    def restored(self, state: Mapping[str, Any]) -> OwnSolutions:
        """Return these solutions with the table and the step of ``state``, which `state_dict` returned."""
        table = {name: [Solution(**values) for values in kept] for name, kept in state["table"].items()}
        return replace(self, table=table, refreshed_at=state["refreshed"])

    def _distinct(self, solutions: Sequence[Solution]) -> list[Solution]:
        distinct: dict[str, Solution] = {}
        for solution in solutions:
            distinct.setdefault(content_of(solution.text), solution)
        return list(distinct.values())[: self.search.keep]


@dataclass(frozen=True)
class Finder:
    """The parts of a search for solutions, besides the problems."""

    sampler: Sampler
    verifier: Verifier
    confidence: re.Pattern[str] | None
    """The pattern of a stated confidence, which the verifier does not see."""
    score: Score
    phases: Phases
    grid: RankGrid
    group_size: int
    """The number of problems that are answered at a time, over all replicas."""


@dataclass(frozen=True)
class OwnSolutionPrompts(UnguidedPrompts):
    """Prompts that show the teacher the model's own solutions instead of the data's."""

    inner: GivenSolutions
    """The prompts that show a chosen solution."""
    own: OwnSolutions
    finder: Finder
    keeps_unhinted: bool = False
    """Whether responses without a solution are trained on, for their rewards; else they are skipped."""

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return the prompts and the metrics of `OwnSolutions.refreshed` after a search, where a search is due.

        The search covers the problems of the coming steps.  Collective.
        """
        if not self.own.due(step):
            return self, {}
        finder = self.finder
        finder.sampler.update_weights(step)
        with finder.phases("solutions"):
            own, metrics = self.own.refreshed(
                step,
                problem_sampler.coming(self.own.refresh_every),
                finder.group_size,
                grid=finder.grid,
                generate=lambda requests: finder.sampler.generate(requests, sampling),
                builder=self.inner.builder,
                verifier=finder.verifier,
                confidence=finder.confidence,
                score=finder.score,
                fits=lambda problem, text: self.inner.pair_with(problem, text) is not None,
            )
        return replace(self, own=own), metrics

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem, the teacher's with the best own solution, where there is one."""
        solution = self.own.solution_for(problem.id)
        return self.inner.pair(problem if solution is None else replace(problem, solution=solution.text))

    def has_solution(self, problem: Problem) -> bool:
        """Return whether an own solution of ``problem`` has been found."""
        return self.own.solution_for(problem.id) is not None

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers to problems with a solution other than the response itself, and solutions/skipped_share.

        The prompts of these answers show that solution.  Under ``keeps_unhinted`` the other answers, whose share is
        solutions/skipped_share, stay without a hint.

        Collectives: one sum over the data-parallel ranks.
        """
        kept = []
        for answer in answers:
            response = response_text(answer.response, self.inner.builder.tokenizer)
            solution = self.own.solution_for(answer.problem.id, response)
            pair = self.inner.pair_with(answer.problem, solution.text) if solution is not None else None
            if solution is not None and pair is not None:
                problem = replace(answer.problem, solution=solution.text)
                kept.append(replace(answer, problem=problem, prompts=pair))
            elif self.keeps_unhinted:
                kept.append(answer.without_hint())
        hinted = sum(answer.hinted for answer in kept)
        counts = torch.tensor([len(answers) - hinted, len(answers)], device=self.finder.grid.device)
        dist.all_reduce(counts, group=self.finder.grid.dp_group)
        return kept, {"solutions/skipped_share": int(counts[0]) / max(int(counts[1]), 1)}

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return these prompts: only a search changes them."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the table of solutions as plain values."""
        return {**self.inner.state_dict(), "own": self.own.state_dict()}

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts with the table of ``state``."""
        return self if state.get("own") is None else replace(self, own=self.own.restored(state["own"]))
