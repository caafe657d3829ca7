# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How good a model is on held-out problems: a greedy and several sampled responses to each, verified."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, Tokenizer
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.verify import Verifier, check_answers, judged_by_all, mentions_answer, voted_answer
from megatron_selfdistill.prechecks import require_answers_per_problem
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, response_text, sample_seed

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid

_NUM_EXAMPLES = 3
_END = 200  # characters of a response that are shown: its answer stands at the end


@dataclass(frozen=True)
class Transcript:
    """One response as text."""

    problem_id: str
    sample: int | None
    """Index of the sample; None is the greedy response."""
    prompt: str
    """With its special tokens."""
    response: str
    """As the verifier saw it."""
    correct: bool
    length: int
    """Tokens, with the stop token."""
    truncated: bool
    """It reached the limit; it then counts as wrong."""


@dataclass(frozen=True)
class Verdict:
    """What became of one response."""

    correct: bool
    length: int
    """Tokens, with the stop token."""
    truncated: bool
    """It reached the limit; it then counts as wrong."""
    answer: str | None
    """What it votes for in a majority (`voted_answer`); None where it is truncated or says nothing, and where the
    evaluation reads no votes."""


@dataclass(frozen=True)
class ProblemResult:
    """The verdicts on the responses to one problem."""

    id: str
    greedy: Verdict
    samples: list[Verdict]

    @property
    def num_correct(self) -> int:
        """Of the samples."""
        return sum(verdict.correct for verdict in self.samples)

    def avg(self) -> float:
        """avg@k for every k: the share of the samples that are right is its estimate from all of them."""
        return self.num_correct / len(self.samples)

    def pass_at_k(self, k: int) -> float:
        """See `pass_at_k`."""
        return pass_at_k(len(self.samples), self.num_correct, k)

    def majority_at_k(self, k: int) -> float:
        """See `majority_at_k`."""
        return majority_at_k([it.answer for it in self.samples], [it.correct for it in self.samples], k)


@dataclass(frozen=True)
class Overlooked:
    """Responses that mention the answer of their problem, where the verifier found no response right at all."""

    num_responses: int
    """All that were judged, greedy and sampled."""
    num_with_answer: int
    """Those that mention the answer (`mentions_answer`) and did not reach the limit."""
    examples: list[tuple[Problem, str]]
    """The first ones' problems, and the ends of these responses."""

    def lines(self, verifier: str, show_contents: bool = True) -> list[str]:
        """Return what a log says about them; ``verifier``: the value of evaluation.verifier; ``show_contents``: whether
        it may quote responses."""
        remedy = _REMEDIES.get(verifier, "look at what your verifier compares")
        shown = [
            f"  {problem.location}: the answer {json.dumps(problem.answer, ensure_ascii=False)}, "
            f"the end of the response {json.dumps(end, ensure_ascii=False)}"
            for problem, end in self.examples
        ]
        return [
            f"0 of {self.num_responses} responses are right by evaluation.verifier={verifier}, but "
            f"{self.num_with_answer} of them mention the answer: {remedy}",
            *(shown if show_contents else ()),
        ]


_REMEDIES = {
    "exact_match": (
        "exact_match compares the whole of the last \\boxed{..}, of what follows the last ####, or of the last line; "
        "set evaluation.verifier=math_verify, or name a function of your own"
    ),
    "math_verify": (
        "math_verify reads the last formula or number; ask for a form that it reads, such as \\boxed{..}, with "
        "data.system_prompt, or name a function of your own in evaluation.verifier"
    ),
}


@dataclass(frozen=True)
class EvaluationResult:
    """Shares are of all responses of the kind; lengths are in tokens."""

    num_problems: int
    num_samples: int
    """Sampled responses per problem; what is said of samples is None where there are none."""
    greedy_accuracy: float
    greedy_mean_length: float
    greedy_truncated_share: float
    sampled_accuracy: float | None
    sampled_mean_length: float | None
    sampled_truncated_share: float | None
    pass_at_k: dict[int, float]
    """k -> mean over problems of the unbiased estimate from the samples."""
    majority_at_k: dict[int, float]
    """The same of the majority's answer."""
    problems: list[ProblemResult]
    """One per problem, in their order."""
    transcripts: list[Transcript]
    """The responses to the first problems: the greedy one, then the samples, problem by problem."""
    overlooked: Overlooked | None = None
    """None where a response is right, or none mentions its answer."""

    def metrics(self, prefix: str = "evaluation") -> dict[str, float]:
        """The numbers under flat keys: evaluation/greedy_accuracy, .., evaluation/pass_at_8, evaluation/majority_at_8;
        avg_at_N of N samples is another name of sampled_accuracy."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        if self.sampled_accuracy is not None:
            numbers[f"avg_at_{self.num_samples}"] = self.sampled_accuracy
        numbers |= {f"pass_at_{k}": value for k, value in self.pass_at_k.items()}
        numbers |= {f"majority_at_{k}": value for k, value in self.majority_at_k.items()}
        return {f"{prefix}/{name}": value for name, value in numbers.items()}


def evaluate(
    sampler: Sampler,
    builder: PromptBuilder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    verifier: Verifier,
    *,
    params: SamplingParams,
    num_samples: int,
    ks: Sequence[int],
    seed: int,
    step: int,
    grid: RankGrid,
    max_length: int,
    majority_ks: Sequence[int] | None = None,
    hinted: bool = False,
    num_transcripts: int | None = 4,
) -> EvaluationResult:
    """One greedy response and ``num_samples`` drawn with ``params`` to the student's prompt of every problem.

    ``problems``: the same on all ranks, each replica samples every dp_size-th.  ``ks``: of pass@k, at most
    ``num_samples``; without samples there is none.  ``majority_ks``: the same of majority@k; null reads
    no final answers.  ``hinted``: the teacher's prompts, with the solution.
    ``num_transcripts``: problems whose responses are kept as text; None keeps all.
    The random stream of sample i is ``sample_seed(seed, step, "eval/" + problem.id, i)``, so results do not
    depend on the parallel sizes.  A response that reached the limit is wrong: it has no final answer.

    Returns: the same on every rank.
    Collectives: two calls of ``sampler.generate`` (one without samples), with no requests where a replica has
    no problem; one all_gather_object over the world, whose ranks share the work of the verifier.
    Raises: ConfigError in one sentence, before anything is sampled, for problems that cannot be judged or do
    not fit ``max_length``; VerifierError on every rank where the verifier failed on one.
    """
    require_answers_per_problem(num_samples, ks, majority_ks or ())
    if not problems:
        raise ConfigError("Evaluation: expected at least one problem, got none.")
    check_answers(problems, verifier)
    prompt_of = builder.teacher_prompt if hinted else builder.student_prompt
    prompts = [prompt_of(problem) for problem in problems]
    _check_lengths(problems, prompts, params.max_new_tokens, max_length)
    mine = range(grid.dp_rank, len(problems), grid.dp_size)

    def requests(samples: int) -> list[Request]:
        return [
            Request(prompts[p], sample_seed(seed, step, f"eval/{problems[p].id}", i))
            for p in mine
            for i in range(samples)
        ]

    greedy = replace(params, temperature=0.0, top_k=0, top_p=1.0)
    written: dict[tuple[int, int | None], Response] = {}
    written |= zip(((p, None) for p in mine), sampler.generate(requests(1), greedy), strict=True)
    if num_samples:
        keys = [(p, i) for p in mine for i in range(num_samples)]
        written |= zip(keys, sampler.generate(requests(num_samples), params), strict=True)

    num_ends = 0  # on this rank

    def judgement(problem: Problem, response: Response) -> _Judged:
        nonlocal num_ends
        text, truncated = response_text(response, tokenizer), response.truncated
        correct = not truncated and bool(verifier(text, problem))
        answer = None if truncated or majority_ks is None else voted_answer(text, verifier)
        kept = text if problem.id in kept_ids else None
        mentions = not truncated and not correct and mentions_answer(text, problem)
        num_ends += mentions
        end = text[-_END:] if mentions and num_ends <= _NUM_EXAMPLES else None
        return _Judged(Verdict(correct, len(response.token_ids), truncated, answer), kept, mentions, end)

    num_kept = len(problems) if num_transcripts is None else num_transcripts
    kept_ids = {problem.id for problem in problems[:num_kept]}
    questions = {key: (problems[key[0]], response) for key, response in written.items()}
    verdicts = judged_by_all(questions, judgement, grid)
    results = [
        ProblemResult(problem.id, verdicts[p, None].verdict, [verdicts[p, i].verdict for i in range(num_samples)])
        for p, problem in enumerate(problems)
    ]
    transcripts = _transcripts(verdicts, prompts[:num_kept], problems, tokenizer, num_samples)
    overlooked = _overlooked(verdicts, problems)
    return replace(_result(results, num_samples, ks, majority_ks or (), transcripts), overlooked=overlooked)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right, ``1 - C(n - c, k) / C(n, k)``.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.  Raises: ValueError unless 0 <= c <= n and 1 <= k
    <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass_at_k: expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, got "
            f"{num_correct} of {num_samples} and k = {k}; draw at least k samples."
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """The unbiased estimate of the chance that the most frequent answer among k samples is right.

    It is the mean, over all subsets of k of the n samples, of the share of right samples among those that gave the
    most frequent answer of the subset; where several answers are the most frequent, the mean over these; 0 where no
    sample of the subset has an answer.  ``answers``: None does not vote.  ``correct``: a verifier may judge two
    responses with one answer differently.

    Equals the sum over answers a and numbers of votes t of (right share of a) E[1 / (1 + ties); a has t votes and none
    has more].  Of k of n samples the votes of the answers are independent binomials with p = k / n, given that they
    sum to k; that makes it a product of polynomials, one per answer that can reach t.
    Raises: ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    if not 1 <= k <= n or len(correct) != n:
        raise ValueError(
            f"majority_at_k: expected 1 <= k <= num_samples and a verdict per sample, got k = {k}, {n} answers and "
            f"{len(correct)} verdicts; draw at least k samples."
        )
    votes = Counter(answer for answer in answers if answer is not None)
    right = Counter(answer for answer, is_right in zip(answers, correct, strict=True) if is_right)
    p, num_silent = k / n, n - votes.total()
    total = 0.0
    for answer, count in votes.items():
        others = [number for other, number in votes.items() if other != answer]
        for t in range(1, min(count, k) + 1) if right[answer] else ():
            total += right[answer] / count * _binomial(count, p)[t] * _wins(others, num_silent, t, k - t, p)
    return float(total / _binomial(n, p)[k])


def _wins(others: Sequence[int], num_silent: int, t: int, rest: int, p: float) -> float:
    """E[1 / (1 + ties); no other answer has more than ``t`` votes, and ``rest`` samples gave no or another answer]."""
    # Answers that cannot reach t need not be told apart: together they are one binomial.
    below = _binomial(num_silent + sum(count for count in others if count < t), p)[: rest + 1]
    table = np.zeros((rest + 1, 1))  # [samples so far, ties so far]
    table[: len(below), 0] = below
    for count in (count for count in others if count >= t):
        chances = _binomial(count, p)
        wider = np.zeros((rest + 1, table.shape[1] + 1))
        for x in range(min(t, rest + 1)):
            wider[x:, :-1] += chances[x] * table[: rest + 1 - x]
        if t <= rest:
            wider[t:, 1:] += chances[t] * table[: rest + 1 - t]
        table = wider
    return float((table[rest] / np.arange(1, table.shape[1] + 1)).sum())


@lru_cache(maxsize=4096)
def _binomial(count: int, p: float) -> np.ndarray:
    """The probabilities of 0 .. count successes; by convolution, since factorials overflow."""
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, [1 - p, p])
    return chances


def _check_lengths(
    problems: Sequence[Problem], prompts: Sequence[list[int]], max_new_tokens: int, max_length: int
) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > max_length:
            raise ConfigError(
                f"{problem.location}: expected a prompt of at most {max_length - max_new_tokens} tokens (the "
                f"longest context {max_length} less rollout.max_new_tokens {max_new_tokens}), got {len(prompt)}; "
                "remove the problem from evaluation.path, or lower rollout.max_new_tokens."
            )


@dataclass(frozen=True)
class _Judged:
    verdict: Verdict
    text: str | None
    """Of those that become transcripts."""
    mentions_answer: bool
    """It does, though the verifier found it wrong and it did not reach the limit."""
    end: str | None
    """The end of the text, of the first few of these on each rank."""


_Verdicts = dict[tuple[int, "int | None"], _Judged]


def _overlooked(verdicts: _Verdicts, problems: Sequence[Problem]) -> Overlooked | None:
    count = sum(judged.mentions_answer for judged in verdicts.values())
    if not count or any(judged.verdict.correct for judged in verdicts.values()):
        return None
    # In the order in which every rank judged its part: the first ones of all are among the first ones of each.
    ordered = sorted(verdicts.items(), key=lambda item: (item[0][1] is not None, item[0][0], item[0][1] or 0))
    ends = [(problems[p], judged.end) for (p, _), judged in ordered if judged.end is not None]
    return Overlooked(len(verdicts), count, ends[:_NUM_EXAMPLES])


def _transcripts(
    verdicts: _Verdicts,
    prompts: Sequence[list[int]],
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    num_samples: int,
) -> list[Transcript]:
    """Of the problems whose ``prompts`` are given."""
    transcripts = []
    for p, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt)
        for sample in (None, *range(num_samples)):
            it, said = verdicts[p, sample].verdict, verdicts[p, sample].text or ""
            transcripts.append(Transcript(problems[p].id, sample, text, said, it.correct, it.length, it.truncated))
    return transcripts


def _result(
    results: list[ProblemResult],
    num_samples: int,
    ks: Sequence[int],
    majority_ks: Sequence[int],
    transcripts: list[Transcript],
) -> EvaluationResult:
    greedy = [result.greedy for result in results]
    sampled = [verdict for result in results for verdict in result.samples]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def share(verdicts: list[Verdict], name: str) -> float:
        return mean([getattr(verdict, name) for verdict in verdicts])

    return EvaluationResult(
        num_problems=len(results),
        num_samples=num_samples,
        greedy_accuracy=share(greedy, "correct"),
        greedy_mean_length=share(greedy, "length"),
        greedy_truncated_share=share(greedy, "truncated"),
        sampled_accuracy=share(sampled, "correct") if num_samples else None,
        sampled_mean_length=share(sampled, "length") if num_samples else None,
        sampled_truncated_share=share(sampled, "truncated") if num_samples else None,
        pass_at_k={k: mean([it.pass_at_k(k) for it in results]) for k in ks if num_samples},
        majority_at_k={k: mean([it.majority_at_k(k) for it in results]) for k in majority_ks if num_samples},
        problems=results,
        transcripts=transcripts,
    )
