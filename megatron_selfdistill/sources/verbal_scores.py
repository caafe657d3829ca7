# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Scores that the teacher gives to responses, as rewards and as a filter, as in OVD (arXiv 2601.21968)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.recipes.verbal_score import DIGITS, LARGEST, auroc, verbal_scores
from megatron_selfdistill.rollout.base import Request, Response, response_text, sample_seed
from megatron_selfdistill.sources.problem_prompts import Answer, Rewarder
from megatron_selfdistill.sources.reward_metrics import over_replicas

Candidates = Callable[[Sequence[Sequence[int]], Sequence[int]], Tensor]
"""A function of this replica's prompts and of n tokens that returns the teacher's log-probs of the tokens after each
prompt, [B, n] float64, on the host.  Collective over the world."""

Generate = Callable[[int, Sequence[Request]], list[Response]]
"""A function of the step and of requests of this replica that samples one response per request with the student's
weights of the step.  Collective over the world."""


@dataclass(frozen=True)
class VerbalScorer:
    """The teacher as a judge, which answers the question how good a response is with a digit."""

    template: str
    """The wording of the question (``verbal.template``)."""
    builder: PromptBuilder
    digits: Sequence[int]
    """The tokens of the digits 0 to 9 (`digit_tokens`)."""
    max_length: int
    """The largest number of tokens of the question."""
    candidates: Candidates
    grid: RankGrid

    def scores(self, answers: Sequence[Answer]) -> tuple[list[float], Mapping[str, float]]:
        """Return the score of each answer of this replica, 0 to 9, and metrics.

        The scores are equal on all ranks of the replica, and the metrics on all ranks.
        Collectives over the world: those of ``candidates``; one sum over the data-parallel ranks.
        """
        log_probs = self.candidates([self._question(answer) for answer in answers], self.digits)
        found: list[float] = verbal_scores(log_probs).tolist()
        total, mass, number = over_replicas((sum(found), log_probs.exp().sum().item(), len(found)), self.grid)
        number = max(number, 1)
        return found, {"verbal/score_mean": total / number, "verbal/digit_mass": mass / number}

    def _question(self, answer: Answer) -> list[int]:
        """Return the prompt that asks for the score; a response that is too long loses its beginning."""
        response = response_text(answer.response, self.builder.tokenizer)
        while True:
            slots = {"solution": answer.prompts.solution, "response": response}
            prompt = self.builder.filled_prompt(answer.problem, self.template, slots)
            excess = len(prompt) + 1 - self.max_length  # the digit follows
            if excess <= 0 or not response:
                return prompt
            response = response[excess:]


@dataclass(frozen=True)
class VerbalRewards:
    """The teacher's scores as rewards, a ninth of the score: a `Rewarder`."""

    scorer: VerbalScorer

    @property
    def phase(self) -> str:
        """The phase of a step that the teacher's pass belongs to."""
        return "measure"

    def rewarded(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with rewards from 0 to 1, and metrics; see `VerbalScorer.scores`."""
        scores, metrics = self.scorer.scores(answers)
        return [replace(one, reward=score / LARGEST) for one, score in zip(answers, scores, strict=True)], metrics


@dataclass(frozen=True)
class VerbalSelection:
    """A filter by the teacher's scores: a response with a score below the threshold is replaced.

    The replacement is sampled after the teacher's prompt with the student's weights, and has its own reward and its own
    mu.  With a separator of steps, it continues the response after its last good step: the longest beginning that ends
    with a step, has a score of the threshold or more, and leaves room for a whole response.  The kept tokens keep their
    mu, and the whole has at most ``max_new_tokens`` tokens.  In a step whose scores do not tell right from wrong
    responses, with an AUROC of at most .5 or with responses of one kind only, all responses stay.
    """

    threshold: float
    scorer: VerbalScorer
    generate: Generate
    rewarder: Rewarder
    seed: int
    """The seed of the run."""
    step_separator: str | None = None
    """The text in the token that ends a step (``verbal.step_separator``); None replaces whole responses."""
    max_new_tokens: int = 0
    """The largest number of tokens of a response; it counts only with a separator."""

    def __call__(self, step: int, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers, some of them replaced, and metrics.

        Collectives over the world: those of the scorer, of ``generate`` and of the rewarder; one all-gather of objects
        and one sum over the data-parallel ranks.
        """
        scores, metrics = self.scorer.scores(answers)
        pooled = gather_items([*zip(scores, (one.correct for one in answers), strict=True)], self.scorer.grid.dp_group)
        area = auroc([score for score, _ in pooled], [right for _, right in pooled])
        filters = area is not None and area > 0.5
        metrics = {**metrics, "verbal/filters": float(filters), "verbal/replaced": 0.0}
        if area is not None:
            metrics["verbal/auroc"] = area
        if not filters:
            return list(answers), metrics
        low = [i for i, score in enumerate(scores) if score < self.threshold]
        kept = self._kept([answers[i] for i in low])
        replaced = self._replacements(step, [answers[i] for i in low], kept)
        chosen = list(answers)
        for i, answer in zip(low, replaced, strict=True):
            chosen[i] = answer
        num_replaced, number, num_continued = over_replicas(
            (len(low), len(answers), sum(count > 0 for count in kept)), self.scorer.grid
        )
        metrics["verbal/replaced"] = num_replaced / max(number, 1)
        if self.step_separator is not None:
            metrics["verbal/continued"] = num_continued / max(num_replaced, 1)
        return chosen, metrics

    def _kept(self, answers: Sequence[Answer]) -> list[int]:
        """Return the number of tokens that each replaced response keeps.  Collective, as the scorer is."""
        if self.step_separator is None:
            return [0] * len(answers)
        ends = [self._step_ends(answer) for answer in answers]
        beginnings = [
            replace(answer, response=Response.unsampled(answer.response.token_ids[:end], "length"))
            for answer, of_answer in zip(answers, ends, strict=True)
            for end in of_answer
        ]
        scores = iter(self.scorer.scores(beginnings)[0])
        return [max((end for end in of_answer if next(scores) >= self.threshold), default=0) for of_answer in ends]

    def _step_ends(self, answer: Answer) -> list[int]:
        """Return the lengths of the beginnings of a response that end with a step and leave room for a response."""
        ids, decode = answer.response.token_ids, self.scorer.builder.tokenizer.decode
        room = self.scorer.max_length - len(answer.prompts.teacher_prompt) - self.max_new_tokens
        last = min(room, len(ids) - 1)
        return [end for end in range(1, last + 1) if str(self.step_separator) in decode([ids[end - 1]])]

    def _replacements(self, step: int, answers: Sequence[Answer], kept: Sequence[int]) -> list[Answer]:
        seen: Counter[tuple[str, int]] = Counter()
        requests = []
        for answer, count in zip(answers, kept, strict=True):
            own = answer.problem.id, answer.group
            name = f"verbal/{answer.problem.id}"
            prompt = [*answer.prompts.teacher_prompt, *answer.response.token_ids[:count]]
            requests.append(Request(prompt, sample_seed(self.seed, step, name, seen[own])))
            seen[own] += 1
        responses = self.generate(step, requests)
        sampled = [
            replace(answer, response=_continued(answer.response, count, rest, self.max_new_tokens), reward=None)
            for answer, count, rest in zip(answers, kept, responses, strict=True)
        ]
        return self.rewarder.rewarded(sampled)[0]


def _continued(response: Response, count: int, rest: Response, limit: int) -> Response:
    """Return the first ``count`` tokens of ``response`` with ``rest`` after them, cut to ``limit`` tokens."""
    if count == 0:
        return rest
    token_ids = [*response.token_ids[:count], *rest.token_ids]
    return replace(
        rest,
        token_ids=token_ids[:limit],
        log_probs=[*response.log_probs[:count], *rest.log_probs][:limit],
        sampled_log_probs=[*response.sampled_log_probs[:count], *rest.sampled_log_probs][:limit],
        finish_reason=rest.finish_reason if len(token_ids) <= limit else "length",
    )


def digit_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the digits 0 to 9.  Raises: `ConfigError` where a digit is not one token of its own."""
    encoded = [tokenizer.encode(digit) for digit in DIGITS]
    for digit, ids in zip(DIGITS, encoded, strict=True):
        if len(ids) != 1 or encoded.count(ids) > 1:
            raise ConfigError(
                f"data.tokenizer={tokenizer.name}: the scores of rollout.select=verbal and policy.reward=verbal are "
                f"read from the tokens of ten digits: expected one token for {digit}, got the tokens {ids}; choose "
                "another selection or reward"
            )
    return [ids[0] for ids in encoded]


def check_room_for_questions(
    problems: Sequence[Problem], builder: PromptBuilder, template: str, *, max_length: int, max_new_tokens: int
) -> None:
    """Raise `ConfigError` where the question for a score, with the longest response, is too long.

    ``max_length``: the largest number of tokens of a context; ``max_new_tokens``: that of a response.
    """
    texts = [
        builder.filled_text(problem, template, {"solution": problem.solution, "response": ""}) for problem in problems
    ]
    for problem, question in zip(problems, builder.tokenizer.encode_batch(texts), strict=True):
        length = len(question) + max_new_tokens + 1
        if length > max_length:
            raise ConfigError(
                f"{problem.location}: the question for a score (verbal.template) shows the problem, the solution and a "
                f"response of up to {max_new_tokens} tokens: expected at most {max_length} tokens, got {length}; "
                "raise data.max_length, lower rollout.max_new_tokens or remove the problem"
            )
