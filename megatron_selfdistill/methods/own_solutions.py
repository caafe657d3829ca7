# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Own solutions: the teacher sees an earlier response of the model whose answer is right, in place of the data's.

Algorithm: Every method.refresh_every steps the current weights solve the problems of the coming steps anew, with
method.num_samples responses each. The verifier keeps up to method.keep right responses per problem, the best by
method.pick. The best one that is not the response itself is the hint of the default method. The records need answers
and no solutions. docs/data.md describes the rules, and the command that writes a file of solutions beforehand.

Equation: For the tokens of a response, method.pick=learnable keeps the responses with the greatest score, in which l is
the student's log-prob and D its divergence from the teacher that sees the answer:

    score = mean l + alpha min l - ratio_weight (mean D + alpha max D)

Paper: None; the score follows the reward of RLT (arXiv 2506.08388).

Differences: A response whose only solution is the same text is not trained on, unless method.weight is above 0.

Command:

    selfdistill method.name=own_solutions method.refresh_every=50 method.num_samples=8 checkpoint.load=... \
        data.tokenizer=... data.path=problems.jsonl run_dir=runs/own

Expected: 100 steps of 32 responses raise the sampled accuracy from .36 to .88 on subtraction (.95 with the given
solutions) and from .51 to .85 on additions (.85 with them); docs/recipes/comparison.md.

Known failure: Where the model solves almost no problem, there are few solutions: look at `solutions/available_share`,
and use given solutions or docs/rollouts.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from megatron_selfdistill.choices import SOLUTION_RANKINGS
from megatron_selfdistill.config.schema.method_config import FOUND, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, OneOf, PositiveInt
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.evaluation.verify import check_answers
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.opsd_rl import OpsdRl
from megatron_selfdistill.methods.parts.hints import chosen_with_hints
from megatron_selfdistill.methods.parts.learnability import learnabilities
from megatron_selfdistill.methods.parts.settings import DistillAndRewardSettings
from megatron_selfdistill.methods.parts.solution_search import content_of, solve
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.rollouts import Rollout


@dataclass(frozen=True)
class OwnSolutionsSettings(DistillAndRewardSettings):
    """The settings of the search for own solutions, and of their use."""

    weight: NonNegativeFloat = 0.0
    """Weight of the advantages of rewards beside the teacher's part.  Above 0, responses without a solution are trained
    on for their rewards; with 0 they are skipped."""
    refresh_every: PositiveInt = 50
    """Number of steps after which the present weights solve the problems of the coming steps anew."""
    num_samples: PositiveInt = 8
    """Number of responses per problem, sampled with the settings of rollout, among which the search finds solutions."""
    keep: PositiveInt = 2
    """Number of right responses kept per problem; the teacher sees the best one that is not the response itself."""
    pick: Annotated[str, OneOf(SOLUTION_RANKINGS)] = "shortest"
    """Rule that ranks the right responses: shortest, most_likely (mean log-prob under the student), random, or
    learnable (the score of methods/parts/learnability.py)."""
    alpha: NonNegativeFloat = 0.01
    """Weight of the least likely token and of the largest divergence from the teacher under pick=learnable."""
    ratio_weight: NonNegativeFloat = 1.0
    """Weight of the divergence of the student from the teacher against the log-prob of the response under
    pick=learnable; 0 ranks by the log-prob alone."""

    required = ("data.kind=problems",)

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, hint=FOUND)


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
class OwnSolutionHints(OpsdRl):
    """The method whose teacher sees the model's own solutions instead of the data's.

    The table of solutions is a value, the same on every rank of the world: `refreshed` returns a method with another.
    """

    Settings = OwnSolutionsSettings
    table: Mapping[str, Sequence[Solution]] = field(default_factory=dict)
    """Problem id -> its solutions, best first."""
    refreshed_at: int | None = None
    """The step of the last search; None before the first."""

    def check_data(self) -> None:
        """Raise `ConfigError` for a problem without an answer."""
        check_answers(self.tools.run_data.problems.problems, self.tools.judge.verifier)

    def due(self, step: int) -> bool:
        """Return whether a search is due before the step that ``step`` optimizer steps precede."""
        return self.refreshed_at is None or step >= self.refreshed_at + self.settings.refresh_every

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[OwnSolutionHints, Metrics]:
        """Return the method and the metrics of `refreshed` after a search, where a search is due.

        The search covers the problems of the coming steps.  Collective.
        """
        if not self.due(step):
            return self, {}
        tools, settings = self.tools, self.settings
        tools.sampler.update_weights(step)
        with tools.phases("solutions"):
            return self.refreshed(
                step,
                problem_sampler.coming(settings.refresh_every),
                generate=lambda requests: tools.sampler.generate(requests, sampling),
                builder=tools.given.builder,
                verifier=tools.judge.verifier,
                confidence=tools.judge.confidence,
                score=lambda found: learnabilities(
                    found, tools.models.read_tokens, tools.config, tools.run_data, settings.alpha, settings.ratio_weight
                ),
                fits=lambda problem, text: tools.given.pair_with(problem, text) is not None,
            )

    def refreshed(self, step: int, problems: Sequence[Problem], **tools: Any) -> tuple[OwnSolutionHints, Metrics]:
        """Return the method after a search for solutions of ``problems``, and the metrics of the search.

        The search runs as many problems at a time as a step has, with the present weights.  The new solutions of a
        problem come first; older solutions, which are still right, fill the rest of method.keep.  Other problems keep
        their solutions.  ``tools``: generate, builder, verifier, confidence, score, fits as `solve` takes them.

        The metrics, equal on all ranks: solutions/problems, solutions/pass_rate (right / sampled),
        solutions/solved_share (with a right sample in this search), solutions/available_share (with a solution in the
        table), solutions/length_mean (tokens of the solutions in the table).

        Collectives: per group the collectives of `solve`, and an all_gather_object over the data-parallel ranks.
        """
        config, grid, settings = self.tools.config, self.tools.grid, self.settings
        num_right = num_solved = 0
        table, group_size = dict(self.table), config.data.global_batch_size
        for start in range(0, len(problems), group_size):
            group = problems[start : start + group_size]
            found = [
                (
                    attempt.problem.id,
                    sum(candidate.correct for candidate in attempt.candidates),
                    [Solution(c.text, len(c.response.token_ids), step) for c in attempt.kept],
                )
                for attempt in solve(group, settings, step, seed=config.seed, grid=grid, **tools)
            ]
            for problem_id, right, solutions in gather_items(found, grid.dp_group):
                num_right += right
                num_solved += right > 0
                distinct: dict[str, Solution] = {}
                for solution in (*solutions, *table.get(problem_id, ())):
                    distinct.setdefault(content_of(solution.text), solution)
                table[problem_id] = list(distinct.values())[: settings.keep]
        available = [table[problem.id] for problem in problems if table.get(problem.id)]
        lengths = [solution.length for solutions in available for solution in solutions]
        return replace(self, table=table, refreshed_at=step), {
            "solutions/problems": float(len(problems)),
            "solutions/pass_rate": num_right / max(len(problems) * settings.num_samples, 1),
            "solutions/solved_share": num_solved / max(len(problems), 1),
            "solutions/available_share": len(available) / max(len(problems), 1),
            "solutions/length_mean": sum(lengths) / max(len(lengths), 1),
        }

    def solution_for(self, problem_id: str, response: str | None = None) -> Solution | None:
        """Return the best solution kept for a problem that is not the response itself; None if there is none.

        ``response``: its text without thoughts.  A solution with that content (`content_of`) is the same sample or its
        twin: the teacher's prompt would show the response itself as a hint.
        """
        solutions = self.table.get(problem_id, ())
        if response is None or not solutions:
            return next(iter(solutions), None)
        own = content_of(response)
        return next((solution for solution in solutions if content_of(solution.text) != own), None)

    def prompts(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem, the teacher's with the best own solution, where there is one."""
        solution = self.solution_for(problem.id)
        return self.tools.given.pair(problem if solution is None else replace(problem, solution=solution.text))

    def has_solution(self, problem: Problem) -> bool:
        """Return whether an own solution of ``problem`` has been found."""
        return self.solution_for(problem.id) is not None

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts of problems with a solution other than the response itself, and solutions/skipped_share.

        The prompts of these rollouts show that solution.  Where rewards have a weight, the other rollouts, whose share
        is solutions/skipped_share, stay without a hint.

        Collectives: one sum over the data-parallel ranks.
        """
        selected, _ = super().select(step, rollouts)
        hints = []
        for rollout in selected:
            response = final_part(response_text(rollout.response, self.tools.given.builder.tokenizer))
            solution = self.solution_for(rollout.problem.id, response)
            hints.append(None if solution is None else solution.text)
        kept, found = chosen_with_hints(selected, hints, self.tools, self.settings.weight > 0)
        return kept, {"solutions/skipped_share": 1 - found["hints/share"]}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the table of solutions, and the step of the last search."""
        table = {problem_id: [asdict(s) for s in solutions] for problem_id, solutions in self.table.items()}
        return {"own": {"table": table, "refreshed": self.refreshed_at}}

    def restored(self, state: Mapping[str, Any]) -> OwnSolutionHints:
        """Return this method with the table of ``state``."""
        if (own := state.get("own")) is None:
            return self
        table = {name: [Solution(**values) for values in kept] for name, kept in own["table"].items()}
        return replace(self, table=table, refreshed_at=own["refreshed"])
