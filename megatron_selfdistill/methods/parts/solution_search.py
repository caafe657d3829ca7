# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The search for own solutions: the model answers problems, a verifier finds the right answers, the best are kept.

Only the answer decides: a verifier says whether a response is right, and a response that was cut off is wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.data.problem_sampler import shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.evaluation.verify import Verifier, check_answers, judge, judged_text
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid

Generate = Callable[[list[Request]], list[Response]]
"""A function that samples one response per request of this replica; a collective of the world."""

Score = Callable[[Sequence[tuple[Problem, Response]]], Sequence[float]]
"""A function that returns the learnability of each response of this replica; a collective of the world."""


@dataclass(frozen=True)
class Candidate:
    """One response that may become a solution."""

    sample: int
    """The index of the response among the samples of its problem."""
    response: Response
    text: str
    """The final answer of the response without its thoughts, as the teacher's prompt would show it."""
    correct: bool
    """The verdict of the verifier; a truncated response is wrong."""
    score: float | None = None
    """The learnability of a right response; None if another rule selects."""

    @property
    def mean_log_prob(self) -> float:
        """The mean log-prob per token, in nats, under the model at temperature 1."""
        return sum(self.response.log_probs) / len(self.response.log_probs)


@dataclass(frozen=True)
class Attempt:
    """The candidates of one problem, and the solutions among them."""

    problem: Problem
    candidates: list[Candidate]
    """All candidates, in the order of the samples."""
    kept: list[Candidate]
    """The solutions, best first; no two of them have the same content (`content_of`)."""


def solve(
    problems: Sequence[Problem],
    settings: Any,
    step: int,
    *,
    seed: int,
    generate: Generate,
    builder: PromptBuilder,
    verifier: Verifier,
    grid: RankGrid,
    confidence: re.Pattern[str] | None = None,
    score: Score | None = None,
    fits: Callable[[Problem, str], bool] = lambda problem, text: True,
) -> list[Attempt]:
    """Sample ``method.num_samples`` responses to the own prompt of each problem, and keep the best right responses.

    ``settings``: num_samples, keep and pick of `OwnSolutionsSettings`.  ``problems``: without repetitions, the same on
    all ranks. Each replica takes every dp_size-th problem and
    returns the attempts at these problems, the same on each of its ranks. The seed of sample i is
    ``sample_seed(seed, step, "solution/" + problem.id, i)``: no rollout and no evaluation has this seed, and no
    layout or order changes it. ``confidence``: the pattern of a stated confidence, which the verifier does not see.
    ``score``: needed for pick=learnable. ``fits(problem, text)``: whether a step could show that text.

    Collectives: one call of ``generate``, one of `judge` and, for pick=learnable, one of ``score``.
    Raises: ValueError, before anything is sampled, for problems that cannot be judged; RuntimeError on every rank where
    the verifier failed.
    """
    check_answers(problems, verifier)
    mine = shard(problems, grid.dp_rank, grid.dp_size)
    keys = [(problem, i) for problem in mine for i in range(settings.num_samples)]
    prompts = {problem.id: builder.student_prompt(problem) for problem in mine}
    requests = [
        Request(prompts[problem.id], sample_seed(seed, step, f"solution/{problem.id}", i)) for problem, i in keys
    ]
    responses = generate(requests)
    texts = [judged_text(response, builder.tokenizer, confidence) for response in responses]
    questions = [
        (problem, None if response.truncated else answering)
        for (problem, _), response, (_, _, answering) in zip(keys, responses, texts, strict=True)
    ]
    candidates = [
        Candidate(i, response, final_part(text).strip(), verdict)
        for (_, i), response, (text, _, _), verdict in zip(
            keys, responses, texts, judge(questions, verifier, grid), strict=True
        )
    ]
    if settings.pick == "learnable":
        assert score is not None, "the caller scores texts for pick=learnable"
        right = [at for at, candidate in enumerate(candidates) if candidate.correct]
        for at, value in zip(right, score([(keys[at][0], responses[at]) for at in right]), strict=True):
            candidates[at] = replace(candidates[at], score=value)
    attempts = []
    for number, problem in enumerate(mine):
        own = candidates[number * settings.num_samples : (number + 1) * settings.num_samples]
        attempts.append(Attempt(problem, own, _pick(problem, own, settings, step, seed, fits)))
    return attempts


def _pick(
    problem: Problem,
    candidates: Sequence[Candidate],
    settings: Any,
    step: int,
    seed: int,
    fits: Callable[[Problem, str], bool],
) -> list[Candidate]:
    """Return the right candidates with a content, best first, each content once; of equals the earlier sample."""

    def order(candidate: Candidate) -> tuple[bool, float, int]:
        if settings.pick == "random":
            value: float = sample_seed(seed, step, f"pick/{problem.id}", candidate.sample)
        elif settings.pick == "shortest":
            value = len(candidate.response.token_ids)
        else:
            value = -(candidate.mean_log_prob if settings.pick == "most_likely" else candidate.score or 0.0)
        return math.isnan(value), value, candidate.sample

    kept: dict[str, Candidate] = {}
    for candidate in sorted((c for c in candidates if c.correct), key=order):
        content = content_of(candidate.text)
        if len(kept) < settings.keep and content and content not in kept and fits(problem, candidate.text):
            kept[content] = candidate
    return list(kept.values())


def content_of(text: str) -> str:
    """Return the content of ``text``, which equal responses share: its letters in Unicode's compatibility form.

    White space, invisible characters, letter case and punctuation at the end are removed.  Two texts of one content are
    the same response: a teacher whose prompt shows one text and which scores the other would only recite its hint.
    """
    # NFKC again after casefold, which can leave characters that are not in that form.
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold())
    return folded.rstrip(_FINAL) or folded


# White space, and characters that format text unseen: soft hyphen, zero-width characters, marks of direction.
_INVISIBLE = re.compile("[\\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+")
_FINAL = ".,;:!?。"
