# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How good a model is on held-out problems: a greedy and several sampled responses to each, verified."""

from __future__ import annotations

import importlib
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, Tokenizer
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, stream_seed

if TYPE_CHECKING:  # verifiers are also used where there is no Megatron
    from megatron_selfdistill.parallel import Grid

Verifier = Callable[[str, Problem], bool]
"""``verify(response_text, problem)``: whether the response, without its stop token, is right."""

MATH_TIMEOUT_SECONDS = 5


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
    transcripts: list[Transcript]
    """The responses to the first problems: the greedy one, then the samples, problem by problem."""

    def metrics(self, prefix: str = "evaluation") -> dict[str, float]:
        """The numbers under flat keys: evaluation/greedy_accuracy, .., evaluation/pass_at_8."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        numbers |= {f"pass_at_{k}": value for k, value in self.pass_at_k.items()}
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
    grid: Grid,
    max_length: int,
    hinted: bool = False,
    num_transcripts: int | None = 4,
) -> EvaluationResult:
    """One greedy response and ``num_samples`` drawn with ``params`` to the student's prompt of every problem.

    ``problems``: the same on all ranks, each replica samples every dp_size-th.  ``ks``: of pass@k, at most
    ``num_samples``; without samples there is none.  ``hinted``: the teacher's prompts, with the solution.
    ``num_transcripts``: problems whose responses are kept as text; None keeps all.
    The random stream of sample i is ``stream_seed(seed, step, "eval/" + problem.id, i)``, so results do not
    depend on the parallel sizes.  A response that reached the limit is wrong: it has no final answer.

    Returns: the same on every rank.
    Collectives: two calls of ``sampler.generate`` (one without samples), with no requests where a replica has
    no problem; one all_gather_object over the world, whose ranks share the work of the verifier.
    Raises: ValueError in one sentence, before anything is sampled, for problems that cannot be judged or do
    not fit ``max_length``; RuntimeError on every rank where the verifier failed on one.
    """
    _check(problems, verifier, num_samples, ks)
    prompt_of = builder.teacher_prompt if hinted else builder.student_prompt
    prompts = [prompt_of(problem) for problem in problems]
    _check_lengths(problems, prompts, params.max_new_tokens, max_length)
    mine = range(grid.dp_rank, len(problems), grid.dp_size)

    def requests(samples: int) -> list[Request]:
        return [
            Request(prompts[p], stream_seed(seed, step, f"eval/{problems[p].id}", i))
            for p in mine
            for i in range(samples)
        ]

    greedy = replace(params, temperature=0.0, top_k=0, top_p=1.0)
    written: dict[tuple[int, int | None], Response] = {}
    written |= zip(((p, None) for p in mine), sampler.generate(requests(1), greedy), strict=True)
    if num_samples:
        keys = [(p, i) for p in mine for i in range(num_samples)]
        written |= zip(keys, sampler.generate(requests(num_samples), params), strict=True)

    num_kept = len(problems) if num_transcripts is None else num_transcripts
    verdicts = _judged_by_all(written, problems, verifier, tokenizer, num_kept, grid)
    return _result(verdicts, prompts, problems, tokenizer, num_samples, ks, num_kept)


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


def load_verifier(name: str) -> Verifier:
    """exact_match, math_verify, or a function of the user's by its dotted path, ``package.module.function``.

    Raises: ConfigError in one sentence if there is no such function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, attribute = name.rpartition(".")
    expected = f"evaluation.verifier must be {', '.join(BUILT_IN)} or the dotted path of a function"
    if not module_name:
        raise ConfigError(f"{expected}, got {name!r}")
    try:
        verifier = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"{expected}, got {name!r}: importing {module_name} failed: {error}; put its folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{expected}, got {name!r}: {error}") from error
    if not callable(verifier):
        raise ConfigError(f"{expected}, got {name!r}, which is a {type(verifier).__name__}")
    return verifier


def exact_match(response_text: str, problem: Problem) -> bool:
    """Whether the response as a whole, or else its final answer, is ``problem.answer``, white space aside.

    The final answer is what stands after the last ``</think>``, and there, of these the first that occurs:
    what the last ``\\boxed{..}`` holds; what follows the last ``####``; the last line that is not empty.
    """
    assert problem.answer is not None
    wanted = " ".join(problem.answer.split())
    return wanted in (" ".join(text.split()) for text in (response_text, final_answer(response_text)))


def math_verify(response_text: str, problem: Problem) -> bool:
    """Whether math-verify takes what follows the last ``</think>`` to mean the same as ``problem.answer``.

    The answer is read as LaTeX, with or without dollars; one that cannot be read is compared by
    `exact_match`. Each parse and each comparison ends after MATH_TIMEOUT_SECONDS and then counts as wrong; a
    signal does that, so outside the main thread there is no time limit.
    """
    from math_verify import parse, verify

    assert problem.answer is not None
    seconds = MATH_TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    wanted = _parsed_answer(problem.answer, seconds)
    if not wanted:
        return exact_match(response_text, problem)
    found = parse(_after_thinking(response_text), parsing_timeout=seconds)
    return bool(verify(list(wanted), found, timeout_seconds=seconds))


BUILT_IN: dict[str, Verifier] = {"exact_match": exact_match, "math_verify": math_verify}


def final_answer(text: str) -> str:
    """See `exact_match`; "" where there is none."""
    text = _after_thinking(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _after_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]


def _last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{`` holds up to the brace that closes it; None where none is closed."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


@lru_cache(maxsize=65536)
def _parsed_answer(answer: str, seconds: int | None) -> tuple[Any, ...]:
    from math_verify import parse

    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return tuple(parse(text, parsing_timeout=seconds))


def _check(problems: Sequence[Problem], verifier: Verifier, num_samples: int, ks: Sequence[int]) -> None:
    if not problems:
        raise ValueError("Evaluation: expected at least one problem, got none.")
    if num_samples and (max(ks, default=1) > num_samples or min(ks, default=1) < 1):
        raise ValueError(f"Evaluation: expected every k of pass@k from 1 to the {num_samples} samples, got {list(ks)}.")
    unanswered = [problem for problem in problems if problem.answer is None]
    if unanswered and verifier in BUILT_IN.values():
        raise ValueError(
            f"{unanswered[0].location}: expected an answer that a response can be compared with, got none "
            f"(as in {len(unanswered)} of {len(problems)} problems); set data.fields.answer, "
            "or give a verifier of your own."
        )


def _check_lengths(
    problems: Sequence[Problem], prompts: Sequence[list[int]], max_new_tokens: int, max_length: int
) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > max_length:
            raise ValueError(
                f"{problem.location}: expected a prompt of at most {max_length - max_new_tokens} tokens (the "
                f"longest context {max_length} less max_new_tokens {max_new_tokens}), got {len(prompt)}; "
                "leave the problem out of the evaluation, or lower max_new_tokens."
            )


@dataclass(frozen=True)
class _Verdict:
    correct: bool
    length: int
    truncated: bool
    text: str | None
    """Of those that become transcripts."""


_Verdicts = dict[tuple[int, "int | None"], _Verdict]


def _judged_by_all(
    written: dict[tuple[int, int | None], Response],
    problems: Sequence[Problem],
    verifier: Verifier,
    tokenizer: Tokenizer,
    num_kept: int,
    grid: Grid,
) -> _Verdicts:
    """The verdict on every response of the world, under (index of the problem, sample)."""
    # The ranks of a replica hold the same responses and each judges some.  So nothing is judged twice, and a
    # verifier with a time limit cannot give two ranks different results.
    num_ranks = grid.tp_size * grid.cp_size * grid.pp_size
    rank = (grid.pp_rank * grid.cp_size + grid.cp_rank) * grid.tp_size + grid.tp_rank
    verdicts: _Verdicts = {}
    failure = None
    for number, ((p, sample), response) in enumerate(written.items()):
        if number % num_ranks != rank:
            continue
        truncated = response.finish_reason == "length"
        text = response_text(response, tokenizer)
        try:
            correct = not truncated and bool(verifier(text, problems[p]))
        except Exception as error:  # raised below, on every rank: alone, it would leave the others waiting
            failure = f"{problems[p].location}: the verifier failed with {type(error).__name__}: {error}"
            break
        kept = text if p < num_kept else None
        verdicts[p, sample] = _Verdict(correct, len(response.token_ids), truncated, kept)
    gathered: list[Any] = [(verdicts, failure)]
    if grid.world_size > 1:
        gathered = [None] * grid.world_size
        dist.all_gather_object(gathered, (verdicts, failure))
    failures = [sentence for _, sentence in gathered if sentence is not None]
    if failures:
        raise RuntimeError(failures[0])
    return {key: verdict for part, _ in gathered for key, verdict in part.items()}


def response_text(response: Response, tokenizer: Tokenizer) -> str:
    """What the model said, without special tokens and the stop token, which may be an ordinary one."""
    ended = response.finish_reason == "stop"
    return tokenizer.decode(response.token_ids[:-1] if ended else response.token_ids, skip_special_tokens=True)


def _result(
    verdicts: _Verdicts,
    prompts: Sequence[list[int]],
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    num_samples: int,
    ks: Sequence[int],
    num_kept: int,
) -> EvaluationResult:
    greedy = [verdicts[p, None] for p in range(len(problems))]
    sampled = [[verdicts[p, i] for i in range(num_samples)] for p in range(len(problems))]
    every_sample = [verdict for of_problem in sampled for verdict in of_problem]
    num_correct = [sum(verdict.correct for verdict in of_problem) for of_problem in sampled]

    def share(verdicts: list[_Verdict], name: str) -> float:
        return sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)

    transcripts = []
    for p, problem in enumerate(problems[:num_kept]):
        prompt = tokenizer.decode(prompts[p])
        for sample in (None, *range(num_samples)):
            it = verdicts[p, sample]
            transcripts.append(
                Transcript(problem.id, sample, prompt, it.text or "", it.correct, it.length, it.truncated)
            )
    return EvaluationResult(
        num_problems=len(problems),
        num_samples=num_samples,
        greedy_accuracy=share(greedy, "correct"),
        greedy_mean_length=share(greedy, "length"),
        greedy_truncated_share=share(greedy, "truncated"),
        sampled_accuracy=share(every_sample, "correct") if num_samples else None,
        sampled_mean_length=share(every_sample, "length") if num_samples else None,
        sampled_truncated_share=share(every_sample, "truncated") if num_samples else None,
        pass_at_k={
            k: sum(pass_at_k(num_samples, c, k) for c in num_correct) / len(problems) for k in ks if num_samples
        },
        transcripts=transcripts,
    )
