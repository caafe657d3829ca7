# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The evaluation of a model on held-out problems: greedy and sampled responses to each problem, verified."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.calibration import Confidence, calibration
from megatron_selfdistill.evaluation.estimators import distinct_grams, distinct_right
from megatron_selfdistill.evaluation.evaluation_result import (
    EvaluationResult,
    Overlooked,
    ProblemResult,
    Transcript,
    Verdict,
)
from megatron_selfdistill.evaluation.verify import (
    Verifier,
    check_answers,
    final_answer,
    judged_by_all,
    judged_text,
    mentions_answer,
    voted_answer,
)
from megatron_selfdistill.metrics.leakage import (
    Gram,
    LeakCounts,
    ends_in_loop,
    grams_of_hint,
    hint_counts,
    word_counts,
    word_pattern,
)
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, response_text, sample_seed

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.run_data import RunData

_NUM_EXAMPLES = 3
_END = 200  # characters of the end of a response that are shown, because the answer stands at the end


@dataclass(frozen=True)
class EvaluationOptions:
    """The settings of one evaluation."""

    params: SamplingParams
    """The parameters of the sampled responses; the greedy response has another temperature, top-k and top-p."""
    num_samples: int
    """The number of sampled responses per problem, besides the greedy response."""
    pass_at_k: Sequence[int]
    """The values of k for pass@k, each at most ``num_samples``."""
    seed: int
    """The seed of the run."""
    step: int
    """The optimizer steps before this evaluation; a part of the samples' seeds."""
    majority_at_k: Sequence[int] | None = None
    """The values of k for majority@k, each at most ``num_samples``; None counts no votes."""
    hinted: bool = False
    """Whether the prompt is the teacher's, which shows the solution."""
    num_transcripts: int | None = 4
    """The number of first problems whose responses are kept as text; None keeps all responses."""
    leak_words: Sequence[str] = ()
    """The words and phrases by which a response speaks of its hint (`word_pattern`)."""
    confidence: re.Pattern[str] | None = None
    """The pattern of a text that states the confidence in the response (`split_confidence`)."""
    num_shown: int = 0
    """The number of first problems of which a run writes responses; at most ``num_transcripts``."""

    @classmethod
    def configured(
        cls, config: Config, params: SamplingParams, step: int, hinted: bool, num_transcripts: int | None, **more: Any
    ) -> EvaluationOptions:
        """Return the settings of an evaluation after ``step`` steps; ``more``: further fields.

        The evaluation keeps ``num_transcripts``, and at least the responses that a run writes.
        """
        num_shown = config.report.num_problems if config.shows_contents and not hinted else 0
        return cls(
            params=params,
            num_samples=config.evaluation.num_samples,
            pass_at_k=config.evaluation.pass_at_k,
            seed=config.seed,
            step=step,
            hinted=hinted,
            num_transcripts=None if num_transcripts is None else max(num_transcripts, num_shown),
            confidence=config.evaluation.confidence_pattern,
            num_shown=num_shown,
            **more,
        )


@dataclass(frozen=True)
class Played:
    """What a model has said to a problem: one response, or all responses of an episode with an environment."""

    prompt: list[int]
    """The prompt of the first response."""
    responses: Sequence[Response]
    """The responses in their order; the last one has the final answer."""
    replies: Sequence[str] = ()
    """The texts of the environment after the responses, as far as it has shown them."""
    reward: float | None = None
    """The sum of the rewards of the responses; None without an environment."""


class Player(Protocol):
    """The protocol of what plays the episodes of an evaluation with an environment."""

    def play(self, samples: Sequence[tuple[Problem, int]], params: SamplingParams, *, hinted: bool) -> list[Played]:
        """Return the episode of each sample of this replica, a problem with the index of the sample.  Collective.

        ``hinted``: whether the model reads the teacher's prompts.  Raises: `EngineError` on all ranks.
        """
        ...


def evaluate(
    sampler: Sampler,
    run_data: RunData,
    verifier: Verifier,
    options: EvaluationOptions,
    grid: RankGrid,
    player: Player | None = None,
) -> EvaluationResult:
    """Sample a greedy response and ``num_samples`` further responses to every problem, and return the verified results.

    With a ``player``, each response is an episode with an environment, of which the verifier judges the last response.

    The problems are ``run_data.evaluation``, the same on all ranks; each data-parallel replica samples every dp_size-th
    problem.
    The seed of sample i is ``sample_seed(seed, step, "eval/" + problem.id, i)``, so the results do not depend on the
    parallel sizes.  A response that reached the limit is wrong, since it has no final answer.

    Returns: the same result on every rank.
    Collectives: two calls of ``sampler.generate`` or of ``player.play`` (one call without samples), with no samples on
    a replica that has no problem; one all_gather_object over the world, whose ranks share the work of the verifier.
    Raises: `ConfigError` before the first sample for problems that have no answer or do not fit
    ``run_data.max_length``; `VerifierError` on every rank if the verifier failed on one rank.
    """
    problems, builder, tokenizer = run_data.evaluation, run_data.builder, run_data.tokenizer
    if not problems:
        raise ConfigError("evaluation.path is not set: set it, or evaluation.every=0 and evaluation.at_start=false")
    check_answers(problems, verifier)
    prompt_of = builder.teacher_prompt if options.hinted else builder.student_prompt
    prompts = [prompt_of(problem) for problem in problems]
    check_lengths(problems, prompts, options.params.max_new_tokens, run_data)
    responses = _sample(sampler, problems, prompts, options, grid, player)
    num_kept = len(problems) if options.num_transcripts is None else options.num_transcripts
    kept_ids = {problem.id for problem in problems[:num_kept]}
    hints = _Hints(builder, word_pattern(options.leak_words))
    judge = _Judge(
        verifier, tokenizer, kept_ids, hints, options.confidence, reads_answers=options.majority_at_k is not None
    )
    questions = {key: (problems[key[0]], _asked(key, responses, options.num_samples)) for key in responses}
    verdicts = judged_by_all(questions, judge, grid)
    transcripts = _transcripts(verdicts, problems[:num_kept], options.num_samples)
    return _result(verdicts, problems, options, transcripts)


def _sample(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    options: EvaluationOptions,
    grid: RankGrid,
    player: Player | None,
) -> dict[_Key, Played]:
    """Return what the model says to this replica's problems."""
    own = range(grid.dp_rank, len(problems), grid.dp_size)

    def played(num_samples: int, params: SamplingParams) -> list[Played]:
        samples = [(p, i) for p in own for i in range(num_samples)]
        if player is not None:
            return player.play([(problems[p], i) for p, i in samples], params, hinted=options.hinted)
        requests = [
            Request(prompts[p], sample_seed(options.seed, options.step, f"eval/{problems[p].id}", i))
            for p, i in samples
        ]
        responses = sampler.generate(requests, params)
        return [Played(prompts[p], [response]) for (p, _), response in zip(samples, responses, strict=True)]

    greedy = replace(options.params, temperature=0.0, top_k=0, top_p=1.0)
    found: dict[_Key, Played] = dict(zip(((p, None) for p in own), played(1, greedy), strict=True))
    if options.num_samples:
        keys = [(p, i) for p in own for i in range(options.num_samples)]
        found |= zip(keys, played(options.num_samples, options.params), strict=True)
    return found


_Key = tuple[int, "int | None"]
"""The index of a problem, and the index of the sample; None is the greedy response."""


@dataclass(frozen=True)
class _Asked:
    """What the judgement of a response reads."""

    played: Played
    samples: Sequence[Response]
    """The last responses of all samples of the problem with the first sample; empty with all other responses."""


def _asked(key: _Key, found: Mapping[_Key, Played], num_samples: int) -> _Asked:
    p, sample = key
    return _Asked(found[key], [found[p, i].responses[-1] for i in range(num_samples)] if sample == 0 else [])


class _Hints:
    """The leakage of responses.

    The object keeps the 8-grams of the last problem's hint: the responses to a problem mostly come one after the other.
    """

    def __init__(self, builder: PromptBuilder, pattern: re.Pattern[str] | None) -> None:
        self._builder, self._pattern = builder, pattern
        self._problem: Problem | None = None
        self._grams: frozenset[Gram] = frozenset()

    def leakage(self, problem: Problem, response: Response, text: str) -> LeakCounts:
        """Return the counts of one response; a problem without a solution has no hint."""
        counts = word_counts(text, len(response.token_ids), self._pattern)
        if not problem.solution:
            return counts
        if problem is not self._problem:
            student, teacher = self._builder.student_prompt(problem), self._builder.teacher_prompt(problem)
            self._problem, self._grams = problem, grams_of_hint(student, teacher)
        return counts + hint_counts(response.token_ids, self._grams)


class _Judge:
    """The judgement of one response, with the few ends of responses that this rank keeps as examples."""

    def __init__(
        self,
        verifier: Verifier,
        tokenizer: Tokenizer,
        kept_ids: set[str],
        hints: _Hints,
        pattern: re.Pattern[str] | None,
        *,
        reads_answers: bool,
    ) -> None:
        self._verifier, self._tokenizer, self._hints, self._pattern = verifier, tokenizer, hints, pattern
        self._kept_ids, self._reads_answers = kept_ids, reads_answers
        self._num_ends = 0

    def __call__(self, problem: Problem, asked: _Asked) -> _Judged:
        played, response = asked.played, asked.played.responses[-1]
        truncated = response.truncated
        text, stated, answering = judged_text(response, self._tokenizer, self._pattern)
        correct = not truncated and bool(self._verifier(answering, problem))
        answer = voted_answer(answering, self._verifier) if self._reads_answers and not truncated else None
        kept = self._kept(played, text) if problem.id in self._kept_ids else None
        mentions = not truncated and not correct and mentions_answer(answering, problem)
        self._num_ends += mentions
        end = text[-_END:] if mentions and self._num_ends <= _NUM_EXAMPLES else None
        confidence = Confidence.of_log_probs(response.log_probs) if stated is None else Confidence.stated(stated)
        known = None if math.isnan(confidence.value) else confidence.value
        num_tokens, turns = sum(len(one.token_ids) for one in played.responses), len(played.responses)
        of_tokens = num_tokens, truncated, answer, known, confidence.is_stated
        verdict = Verdict(correct, *of_tokens, ends_in_loop(response.token_ids), turns, played.reward)
        leakage = self._hints.leakage(problem, response, text)
        right = final_answer(answering) if correct else ""
        grams = distinct_grams(it.token_ids for it in asked.samples)
        return _Judged(verdict, kept, mentions, end, leakage, confidence, right, grams)

    def _kept(self, played: Played, last: str) -> tuple[str, str]:
        """Return prompt and response as texts: of an episode the conversation up to ``last``."""
        parts = []
        for number, (response, reply) in enumerate(zip(played.responses[:-1], played.replies, strict=False), 2):
            parts.append(f"{response_text(response, self._tokenizer)}\n--- environment\n{reply}\n--- turn {number}\n")
        return self._tokenizer.decode(played.prompt), "".join([*parts, last])


def check_lengths(
    problems: Sequence[Problem], prompts: Sequence[list[int]], max_new_tokens: int, run_data: RunData
) -> None:
    """Raise `ConfigError` for the first of the ``prompts`` that leaves no room for a response."""
    max_length = run_data.max_length
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > max_length:
            raise ConfigError(
                f"{problem.location}: expected a prompt of at most {max_length - max_new_tokens} tokens (the "
                f"longest context {max_length} less rollout.max_new_tokens {max_new_tokens}), got {len(prompt)}; "
                "remove the problem from evaluation.path, or lower rollout.max_new_tokens."
            )


@dataclass(frozen=True)
class _Judged:
    """The judgement of a response, as one rank makes it."""

    verdict: Verdict
    texts: tuple[str, str] | None
    """Prompt and response, as texts, of a response that becomes a transcript; None for every other response."""
    mentions_answer: bool
    """Whether the text mentions the answer, although the verifier judged the response as wrong."""
    end: str | None
    """The end of the text; None except for the first few responses on each rank that mention the answer."""
    leakage: LeakCounts
    confidence: Confidence
    right_answer: str
    """The final answer of a right response; empty for a wrong one."""
    distinct_4grams: float | None
    """Distinct-4 of the samples of the problem, with the first sample; None with all other responses."""


_Verdicts = dict[_Key, _Judged]


def _overlooked(verdicts: _Verdicts, problems: Sequence[Problem]) -> Overlooked | None:
    count = sum(judged.mentions_answer for judged in verdicts.values())
    if not count or any(judged.verdict.correct for judged in verdicts.values()):
        return None
    # Every rank judged its part in this order, so the first of all examples are among the first examples of a rank.
    ordered = sorted(verdicts.items(), key=lambda item: (item[0][1] is not None, item[0][0], item[0][1] or 0))
    ends = [(problems[p], judged.end) for (p, _), judged in ordered if judged.end is not None]
    return Overlooked(len(verdicts), count, ends[:_NUM_EXAMPLES])


def _transcripts(verdicts: _Verdicts, problems: Sequence[Problem], num_samples: int) -> list[Transcript]:
    """Return the transcripts of the first ``problems``, whose texts are kept."""
    transcripts = []
    for p, problem in enumerate(problems):
        for sample in (None, *range(num_samples)):
            verdict, (prompt, response) = verdicts[p, sample].verdict, verdicts[p, sample].texts or ("", "")
            outcome = verdict.correct, verdict.length, verdict.truncated
            transcripts.append(Transcript(problem.id, sample, prompt, response, *outcome))
    return transcripts


_SHARES = {"accuracy": "correct", "mean_length": "length", "truncated_share": "truncated", "loop_share": "loops"}
_SHARES_OF_EPISODES = {"mean_reward": "reward", "mean_turns": "turns"}
"""The names of shares and means in `EvaluationResult` -> the field of `Verdict` over which each is taken."""


def _result(
    verdicts: _Verdicts, problems: Sequence[Problem], options: EvaluationOptions, transcripts: list[Transcript]
) -> EvaluationResult:
    num_samples = options.num_samples
    results = [_problem_result(p, problem, verdicts, num_samples) for p, problem in enumerate(problems)]
    ks, majority_ks = (options.pass_at_k, options.majority_at_k or ()) if num_samples else ((), ())
    grams = [result.distinct_4grams for result in results if result.distinct_4grams is not None]
    plays = results[0].greedy.reward is not None

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    numbers: dict[str, Any] = {}
    greedy = [verdicts[p, None] for p in range(len(problems))]
    sampled = [verdicts[p, i] for p in range(len(problems)) for i in range(num_samples)]
    for kind, judged in (("greedy", greedy), ("sampled", sampled)):
        for name, field in (_SHARES | _SHARES_OF_EPISODES if plays else _SHARES).items():
            numbers[f"{kind}_{name}"] = mean([getattr(it.verdict, field) for it in judged]) if judged else None
        leaks = sum((it.leakage for it in judged), LeakCounts())
        numbers[f"{kind}_hint_8grams"] = leaks.hint_share
        numbers[f"{kind}_leak_words_per_1000"] = leaks.words_per_1000
        numbers[f"{kind}_quoted_hint_share"] = leaks.quoted_hint_share
        right = [it.verdict.correct for it in judged]
        numbers[f"{kind}_calibration"] = calibration([it.confidence for it in judged], right)
    return EvaluationResult(
        num_problems=len(results),
        num_samples=num_samples,
        pass_at_k={k: mean([result.pass_at_k(k) for result in results]) for k in ks},
        majority_at_k={k: mean([result.majority_at_k(k) for result in results]) for k in majority_ks},
        problems=results,
        transcripts=transcripts,
        overlooked=_overlooked(verdicts, problems),
        distinct_right=mean([result.distinct_right or 0 for result in results]) if num_samples else None,
        distinct_4grams=mean(grams) if grams else None,
        **numbers,
    )


def _problem_result(p: int, problem: Problem, verdicts: _Verdicts, num_samples: int) -> ProblemResult:
    """Return the result of problem number ``p``."""
    samples = [verdicts[p, i] for i in range(num_samples)]
    right = [it.verdict.correct for it in samples]
    return ProblemResult(
        problem.id,
        verdicts[p, None].verdict,
        [it.verdict for it in samples],
        distinct_right((it.right_answer for it in samples), right) if samples else None,
        samples[0].distinct_4grams if samples else None,
    )
