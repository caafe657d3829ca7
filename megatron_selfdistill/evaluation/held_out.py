# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The evaluation of a model on held-out problems: greedy and sampled responses to each problem, verified."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.estimators import Confidence, calibration, distinct_grams, distinct_right
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
    LeakCounts,
    ends_in_loop,
    grams_of_hint,
    hint_counts,
    word_counts,
    word_pattern,
)
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, response_text
from megatron_selfdistill.rollout.sampling import sample_seed

if TYPE_CHECKING:
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid

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
    """The number of first problems whose responses are all kept as text; None keeps all responses."""
    leak_words: Sequence[str] = ()
    """The words and phrases by which a response speaks of its hint (`word_pattern`)."""
    confidence: re.Pattern[str] | None = None
    """The pattern of a text that states the confidence in the response (`split_confidence`)."""
    num_shown: int = 0
    """The number of first problems of which a run writes the greedy response and the first sample."""

    @classmethod
    def configured(
        cls, config: Config, params: SamplingParams, step: int, hinted: bool, **more: Any
    ) -> EvaluationOptions:
        """Return the settings of an evaluation after ``step`` steps; ``more``: further fields."""
        return cls(
            params=params,
            num_samples=config.evaluation.num_samples,
            pass_at_k=config.evaluation.pass_at_k,
            seed=config.seed,
            step=step,
            hinted=hinted,
            confidence=config.evaluation.confidence_pattern,
            **more,
        )


@dataclass(frozen=True)
class Played:
    """What a model has said to a problem: one response, or all responses of an episode."""

    prompt: list[int]
    """The prompt of the first response."""
    responses: Sequence[Response]
    """The responses in their order; the last one has the final answer."""
    replies: Sequence[str] = ()
    """The texts of the replies to the responses, as far as prompts have shown them."""
    reward: float | None = None
    """The sum of the rewards of the responses; None without a `Player`."""


class Player(Protocol):
    """The protocol of what plays the episodes of an evaluation."""

    def play(self, samples: Sequence[tuple[Problem, int]], params: SamplingParams, *, hinted: bool) -> list[Played]:
        """Return the episode of each sample of this replica, a problem with the index of the sample.  Collective.

        ``hinted``: whether the model reads the teacher's prompts.  Raises: `EngineError` on all ranks.
        """


def evaluate(
    sampler: Sampler,
    run_data: RunData,
    verifier: Verifier,
    options: EvaluationOptions,
    grid: RankGrid,
    player: Player | None = None,
) -> EvaluationResult:
    """Sample a greedy response and ``num_samples`` further responses to every problem, and return the verified results.

    With a ``player``, each response begins an episode, of which the verifier judges the last response.

    The problems are ``run_data.evaluation``, the same on all ranks; each replica samples every dp_size-th problem.
    The seed of sample i is ``sample_seed(seed, step, "eval/" + problem.id, i)``, so the results do not depend on the
    parallel sizes.  A response that reached the limit is wrong, since it has no final answer.

    Returns: the same result on every rank.
    Collectives: two calls of ``sampler.generate`` or of ``player.play`` (one call without samples), with no samples on
    a replica that has no problem; one all_gather_object over the world, whose ranks share the work of the verifier.
    Raises: `ConfigError` as `checked_prompts`; `VerifierError` on every rank if the verifier failed on one rank.
    """
    problems = run_data.evaluation
    if not problems:
        raise ConfigError("evaluation.path is not set: set it, or evaluation.every=0 and evaluation.at_start=false")
    prompts = checked_prompts(run_data, verifier, options.params.max_new_tokens, hinted=options.hinted)
    responses = _sample(sampler, problems, prompts, options, grid, player)
    kept: dict[str, int | None] = {problem.id: 2 for problem in problems[: options.num_shown]}
    kept |= dict.fromkeys((problem.id for problem in problems[: options.num_transcripts]), None)
    judge = _Judge(verifier, run_data, options, kept)
    found = judged_by_all({p: (problems[p], responses[p]) for p in responses}, judge, grid)
    return _result([found[p] for p in range(len(problems))], problems, options)


def checked_prompts(
    run_data: RunData, verifier: Verifier, max_new_tokens: int, *, hinted: bool = False
) -> list[list[int]]:
    """Return the prompts of the held-out problems, those of the teacher if ``hinted``.

    Raises: `ConfigError` for a problem without an answer, and for a prompt that leaves no room for a response.
    """
    problems, builder, most = run_data.evaluation, run_data.builder, run_data.max_length - max_new_tokens
    check_answers(problems, verifier)
    prompts = [(builder.teacher_prompt if hinted else builder.student_prompt)(problem) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) > most:
            raise ConfigError(
                f"{problem.location}: expected a prompt of at most {most} tokens (the longest context "
                f"{run_data.max_length} less rollout.max_new_tokens {max_new_tokens}), got {len(prompt)}; "
                "remove the problem from evaluation.path, or lower rollout.max_new_tokens."
            )
    return prompts


def _sample(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    options: EvaluationOptions,
    grid: RankGrid,
    player: Player | None,
) -> dict[int, list[Played]]:
    """Return what the model says to each problem of this replica: the greedy response, then the samples."""
    own, num_samples = range(grid.dp_rank, len(problems), grid.dp_size), options.num_samples

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

    greedy = played(1, replace(options.params, temperature=0.0, top_k=0, top_p=1.0))
    sampled = played(num_samples, options.params) if num_samples else []
    return {
        p: [greedy[place], *sampled[place * num_samples : (place + 1) * num_samples]] for place, p in enumerate(own)
    }


@dataclass(frozen=True)
class _JudgedResponse:
    verdict: Verdict
    confidence: Confidence
    leakage: LeakCounts
    mentions_answer: bool
    """Whether the text mentions the answer, although the verifier judged the response as wrong."""


@dataclass(frozen=True)
class _JudgedProblem:
    """The judgement of all responses to a problem, as one rank makes it."""

    result: ProblemResult
    responses: list[_JudgedResponse]
    """The greedy response, then the samples."""
    transcripts: list[Transcript]
    """The responses as text; empty unless they are kept."""
    end: str | None
    """The end of the first response that mentions the answer; None without one."""


class _Judge:
    def __init__(
        self, verifier: Verifier, run_data: RunData, options: EvaluationOptions, kept: Mapping[str, int | None]
    ) -> None:
        """``kept``: the number of first responses that are kept as text, by the ids of problems; None keeps all."""
        self._verifier, self._builder, self._tokenizer = verifier, run_data.builder, run_data.tokenizer
        self._options, self._kept, self._words = options, kept, word_pattern(options.leak_words)

    def __call__(self, problem: Problem, played: Sequence[Played]) -> _JudgedProblem:
        hint = None  # a problem without a solution has none
        if problem.solution:
            hint = grams_of_hint(self._builder.student_prompt(problem), self._builder.teacher_prompt(problem))
        judged, texts, answers = list[_JudgedResponse](), list[str](), list[str]()
        for one in played:
            text, stated, answering = judged_text(one.responses[-1], self._tokenizer, self._options.confidence)
            response, truncated = one.responses[-1], one.responses[-1].truncated
            correct = not truncated and bool(self._verifier(answering, problem))
            votes = self._options.majority_at_k is not None and not truncated
            confidence = Confidence.of_log_probs(response.log_probs) if stated is None else Confidence.stated(stated)
            verdict = Verdict(
                correct,
                sum(len(response.token_ids) for response in one.responses),
                truncated,
                voted_answer(answering, self._verifier) if votes else None,
                None if math.isnan(confidence.value) else confidence.value,
                confidence.is_stated,
                ends_in_loop(response.token_ids),
                len(one.responses),
                one.reward,
            )
            leakage = word_counts(text, len(response.token_ids), self._words)
            leakage += LeakCounts() if hint is None else hint_counts(response.token_ids, hint)
            mentions = not truncated and not correct and mentions_answer(answering, problem)
            judged.append(_JudgedResponse(verdict, confidence, leakage, mentions))
            texts.append(text)
            answers.append(final_answer(answering) if correct else "")
        greedy, *samples = verdicts = [it.verdict for it in judged]
        result = ProblemResult(
            problem.id,
            greedy,
            samples,
            distinct_right(answers[1:], [it.correct for it in samples]) if samples else None,
            distinct_grams(it.responses[-1].token_ids for it in played[1:]) if samples else None,
        )
        transcripts = []
        if problem.id in self._kept:
            every = zip((None, *range(len(samples))), played, texts, verdicts, strict=True)
            for sample, one, text, it in islice(every, self._kept[problem.id]):
                shown = self._tokenizer.decode(one.prompt), self._conversation(one, text)
                transcripts.append(Transcript(problem.id, sample, *shown, it.correct, it.length, it.truncated))
        ends = [text[-_END:] for text, it in zip(texts, judged, strict=True) if it.mentions_answer]
        return _JudgedProblem(result, judged, transcripts, ends[0] if ends else None)

    def _conversation(self, played: Played, last: str) -> str:
        """Return the text of a response, and of an episode the conversation up to ``last``."""
        parts = []
        for number, (response, reply) in enumerate(zip(played.responses[:-1], played.replies, strict=False), 2):
            parts.append(f"{response_text(response, self._tokenizer)}\n--- reply\n{reply}\n--- turn {number}\n")
        return "".join([*parts, last])


def _overlooked(found: Sequence[_JudgedProblem], problems: Sequence[Problem]) -> Overlooked | None:
    judged = [it for one in found for it in one.responses]
    count = sum(it.mentions_answer for it in judged)
    if not count or any(it.verdict.correct for it in judged):
        return None
    ends = [(problem, one.end) for problem, one in zip(problems, found, strict=True) if one.end is not None]
    return Overlooked(len(judged), count, ends[:_NUM_EXAMPLES])


_SHARES = {"accuracy": "correct", "mean_length": "length", "truncated_share": "truncated", "loop_share": "loops"}
_SHARES_OF_EPISODES = {"mean_reward": "reward", "mean_turns": "turns"}
_LEAKS = {
    "leak/hint_8grams": "hint_8grams",
    "leak/words_per_1000": "leak_words_per_1000",
    "response/quoted_hint_share": "quoted_hint_share",
}
"""The names of shares and means in `EvaluationResult` -> the field of `Verdict` over which each is taken."""


def _result(
    found: Sequence[_JudgedProblem], problems: Sequence[Problem], options: EvaluationOptions
) -> EvaluationResult:
    num_samples, results = options.num_samples, [one.result for one in found]
    ks, majority_ks = (options.pass_at_k, options.majority_at_k or ()) if num_samples else ((), ())
    grams = [result.distinct_4grams for result in results if result.distinct_4grams is not None]
    plays = results[0].greedy.reward is not None

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    numbers: dict[str, Any] = {}
    further: dict[str, float] = {}
    greedy = [one.responses[0] for one in found]
    sampled = [it for one in found for it in one.responses[1:]]
    for kind, judged in (("greedy", greedy), ("sampled", sampled)):
        for name, field in _SHARES.items():
            numbers[f"{kind}_{name}"] = mean([getattr(it.verdict, field) for it in judged]) if judged else None
        for name, field in _SHARES_OF_EPISODES.items() if plays and judged else ():
            further[f"{kind}_{name}"] = mean([getattr(it.verdict, field) for it in judged])
        leaks = sum((it.leakage for it in judged), LeakCounts())
        further |= {f"{kind}_{_LEAKS[key]}": value for key, value in leaks.metrics().items()}
        right = [it.verdict.correct for it in judged]
        numbers[f"{kind}_calibration"] = calibration([it.confidence for it in judged], right)
    if num_samples:
        further["distinct_right"] = mean([result.distinct_right or 0 for result in results])
    if grams:
        further["distinct_4grams"] = mean(grams)
    return EvaluationResult(
        num_problems=len(results),
        num_samples=num_samples,
        pass_at_k={k: mean([result.pass_at_k(k) for result in results]) for k in ks},
        majority_at_k={k: mean([result.majority_at_k(k) for result in results]) for k in majority_ks},
        problems=results,
        transcripts=[transcript for one in found for transcript in one.transcripts],
        overlooked=_overlooked(found, problems),
        further=further,
        **numbers,
    )
