# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Own solutions: responses of the model whose answer is right, which of them are kept, and which one a step is shown.

Only the answer decides: a verifier says whether a response is right, and one that was cut off is wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_selfdistill.data.contexts import PromptPair, fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem, shard
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.evaluation.verify import Verifier, check_answers, judge
from megatron_selfdistill.rollout.base import Request, Response, response_text, stream_seed

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid

Generate = Callable[[list[Request]], list[Response]]
"""What a sampler does with this replica's requests; a collective of the world."""

Score = Callable[[Sequence[tuple[Problem, Response]]], Sequence[float]]
"""How learnable each of this replica's responses is (score.py), more being better; a collective of the world."""


@dataclass(frozen=True)
class Search:
    """How solutions are looked for."""

    num_samples: int
    """Responses per problem."""
    keep: int
    """Solutions per problem, at most."""
    pick: str
    """Which of the right ones are kept: shortest (in tokens), most_likely (mean log-prob per token under the student),
    random (by problem and step), learnable (by `Score`)."""
    seed: int
    """Of the run."""


@dataclass(frozen=True)
class Candidate:
    """One response that may become a solution."""

    sample: int
    """Its index among the problem's samples."""
    response: Response
    text: str
    """As the verifier saw it, and as the teacher would be shown it."""
    correct: bool
    score: float | None = None
    """Of right ones, where they are picked by it."""

    @property
    def mean_log_prob(self) -> float:
        """Per token, nats, under the model at temperature 1."""
        return sum(self.response.log_probs) / len(self.response.log_probs)


@dataclass(frozen=True)
class Attempt:
    """What became of one problem."""

    problem: Problem
    candidates: list[Candidate]
    """In the order of the samples."""
    kept: list[Candidate]
    """The solutions, best first; no two with the same content (`content_of`)."""


@dataclass(frozen=True)
class Solution:
    """A verified response of the model, as the table of a run keeps it."""

    text: str
    length: int
    """Tokens, as it was sampled."""
    step: int
    """Optimizer steps behind the weights that wrote it."""


def solve(
    problems: Sequence[Problem],
    search: Search,
    step: int,
    *,
    generate: Generate,
    builder: PromptBuilder,
    verifier: Verifier,
    grid: RankGrid,
    score: Score | None = None,
    fits: Callable[[Problem, str], bool] = lambda problem, text: True,
) -> list[Attempt]:
    """Samples ``search.num_samples`` responses to each problem's own prompt, and keeps the best of the right ones.

    ``problems``: different ones, the same on all ranks; each replica takes every dp_size-th, and gets what became of
    those, the same on each of its ranks.  The random stream of sample i is ``stream_seed(seed, step, "solution/" +
    problem.id, i)``: no rollout and no evaluation has it, and no layout or order changes it.
    ``score``: needed for pick=learnable.  ``fits(problem, text)``: whether a step could show that text.

    Collectives: one call of ``generate``, one of `judge` and, for pick=learnable, one of ``score``.
    Raises: ValueError, before anything is sampled, for problems that cannot be judged; RuntimeError on every rank where
    the verifier failed.
    """
    check_answers(problems, verifier)
    mine = shard(problems, grid.dp_rank, grid.dp_size)
    keys = [(problem, i) for problem in mine for i in range(search.num_samples)]
    prompts = {problem.id: builder.student_prompt(problem) for problem in mine}
    requests = [
        Request(prompts[problem.id], stream_seed(search.seed, step, f"solution/{problem.id}", i)) for problem, i in keys
    ]
    responses = generate(requests)
    texts = [response_text(response, builder.tokenizer) for response in responses]
    verdicts = judge(
        {
            (problem.id, i): (problem, None if response.truncated else text)
            for (problem, i), response, text in zip(keys, responses, texts, strict=True)
        },
        verifier,
        grid,
    )
    candidates = [
        Candidate(i, response, text, verdicts[problem.id, i])
        for (problem, i), response, text in zip(keys, responses, texts, strict=True)
    ]
    if search.pick == "learnable":
        if score is None:
            raise ValueError(
                "solve: pick=learnable expected a function that scores texts, got none; see pipeline/score.py."
            )
        right = [at for at, candidate in enumerate(candidates) if candidate.correct]
        for at, value in zip(right, score([(keys[at][0], responses[at]) for at in right]), strict=True):
            candidates[at] = replace(candidates[at], score=value)
    attempts = []
    for number, problem in enumerate(mine):
        own = candidates[number * search.num_samples : (number + 1) * search.num_samples]
        attempts.append(Attempt(problem, own, _pick(problem, own, search, step, fits)))
    return attempts


def _pick(
    problem: Problem, candidates: Sequence[Candidate], search: Search, step: int, fits: Callable[[Problem, str], bool]
) -> list[Candidate]:
    """Return the right ones that say something, best first, each content once; of equals the earlier sample."""

    def order(candidate: Candidate) -> tuple[bool, float, int]:
        if search.pick == "random":
            value: float = stream_seed(search.seed, step, f"pick/{problem.id}", candidate.sample)
        elif search.pick == "shortest":
            value = len(candidate.response.token_ids)
        else:
            value = -(candidate.mean_log_prob if search.pick == "most_likely" else candidate.score or 0.0)
        return math.isnan(value), value, candidate.sample

    kept: dict[str, Candidate] = {}
    for candidate in sorted((c for c in candidates if c.correct), key=order):
        content = content_of(candidate.text)
        if len(kept) < search.keep and content and content not in kept and fits(problem, candidate.text):
            kept[content] = candidate
    return list(kept.values())


def content_of(text: str) -> str:
    """Return what equal responses share: ``text`` without white space, invisible characters, letter case and
    punctuation at its end, in Unicode's compatibility form.

    Two texts of one content are the same response: a teacher that is shown one of them and reads the other would only
    recite its hint.
    """
    # NFKC again after casefold, which can leave characters that are not in that form.
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold())
    return folded.rstrip(_FINAL) or folded


# White space, and what formats text without being seen: soft hyphen, zero-width characters, marks of direction.
_INVISIBLE = re.compile("[\\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+")
_FINAL = ".,;:!?。"


def prompts_with(
    builder: PromptBuilder, problem: Problem, solution: str, *, max_length: int, max_new_tokens: int, policy: str
) -> PromptPair | None:
    """`fit_teacher_prompt` with an own solution; None where that does not fit.

    The policy "error" is about what a run was given, and a solution found in it is only left out: it acts as "drop".
    """
    return fit_teacher_prompt(
        builder,
        replace(problem, solution=solution),
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        policy="drop" if policy == "error" else policy,
    )


class OwnSolutions:
    """The solutions of a run: which ones its problems have, and when they are looked for anew.

    Every rank of the world makes the same calls and holds the same table.
    """

    def __init__(self, search: Search, refresh_every: int) -> None:
        """``refresh_every``: steps between searches."""
        self.search, self.refresh_every = search, refresh_every
        self._table: dict[str, list[Solution]] = {}
        self._refreshed: int | None = None

    def due(self, step: int) -> bool:
        """Whether solutions are to be looked for before the step that ``step`` optimizer steps precede."""
        return self._refreshed is None or step >= self._refreshed + self.refresh_every

    def refresh(
        self, step: int, problems: Sequence[Problem], group_size: int, *, grid: RankGrid, **tools: Any
    ) -> dict[str, float]:
        """Look for solutions of ``problems``, ``group_size`` at a time, with the weights of this moment.

        A problem's new solutions come first; older ones, which are as right as they were, fill up what is left of
        ``search.keep``.  Problems that are not asked for keep what they have.
        ``tools``: generate, builder, verifier, score, fits as `solve` takes them.

        Returns: solutions/problems, solutions/pass_rate (right / sampled), solutions/solved_share (with a right sample
        now), solutions/available_share (with a solution in the table), solutions/length_mean (tokens of those in the
        table); equal on all ranks.
        Collectives: per group those of `solve`, and an all_gather_object over the data-parallel ranks.
        """
        num_right = num_sampled = num_solved = 0
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
            for problem_id, right, solutions in of_all_replicas(found, grid):
                num_sampled += self.search.num_samples
                num_right += right
                num_solved += right > 0
                self._add(problem_id, solutions)
        self._refreshed = step
        available = [self._table[problem.id] for problem in problems if self._table.get(problem.id)]
        lengths = [solution.length for solutions in available for solution in solutions]
        return {
            "solutions/problems": float(len(problems)),
            "solutions/pass_rate": num_right / max(num_sampled, 1),
            "solutions/solved_share": num_solved / max(len(problems), 1),
            "solutions/available_share": len(available) / max(len(problems), 1),
            "solutions/length_mean": sum(lengths) / max(len(lengths), 1),
        }

    def solution_for(self, problem_id: str, response: str | None = None) -> Solution | None:
        """Return the best solution kept for a problem that is not the response itself; None where there is none.

        ``response``: its text (`response_text`).  A solution with that content (`content_of`) is the same sample or its
        twin: the response would be shown itself as a hint.
        """
        solutions = self._table.get(problem_id, [])
        if response is None or not solutions:
            return next(iter(solutions), None)
        own = content_of(response)
        return next((solution for solution in solutions if content_of(solution.text) != own), None)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the table, and the step of the last search."""
        table = {problem_id: [asdict(s) for s in solutions] for problem_id, solutions in self._table.items()}
        return {"table": table, "refreshed": self._refreshed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._table = {name: [Solution(**values) for values in kept] for name, kept in state["table"].items()}
        self._refreshed = state["refreshed"]

    def _add(self, problem_id: str, solutions: Sequence[Solution]) -> None:
        distinct: dict[str, Solution] = {}
        for solution in (*solutions, *self._table.get(problem_id, ())):
            distinct.setdefault(content_of(solution.text), solution)
        self._table[problem_id] = list(distinct.values())[: self.search.keep]


def of_all_replicas(mine: list[Any], grid: RankGrid) -> list[Any]:
    """The lists of all replicas, one after the other, on every rank.  One all_gather_object over the data-parallel
    ranks."""
    if grid.dp_size == 1:
        return mine
    everyone: list[list[Any]] = [[] for _ in range(grid.dp_size)]
    dist.all_gather_object(everyone, mine, group=grid.dp_group)
    return [item for part in everyone for item in part]
