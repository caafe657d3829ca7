# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Verifiers, which judge whether a response is correct: comparisons of its final answer, or the user's function."""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_selfdistill.config import function_named
from megatron_selfdistill.config.functions import own_lines
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.records import finite_number, plain
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.errors import ConfigError, VerifierError
from megatron_selfdistill.evaluation.estimators import split_confidence
from megatron_selfdistill.rollout.base import Response, response_text

if TYPE_CHECKING:  # verifiers are also used without Megatron
    from megatron_selfdistill.data.tokenizer import Tokenizer
    from megatron_selfdistill.distributed.ranks import RankGrid

Key = TypeVar("Key", bound=Hashable)
Content = TypeVar("Content")
Verdict = TypeVar("Verdict")

Verifier = Callable[[str, Problem], bool]
"""A function ``verify(final_answer, problem)`` that returns whether a response is right.

It reads the response without its stop token and, if it is a function of the user, without its thoughts."""

Reward = Callable[[str, Problem], float]
"""A function ``reward(response_text, problem)`` that returns a finite number; a verifier is such a function, too."""

MATH_TIMEOUT_SECONDS = 5


def load_verifier(name: str) -> Verifier:
    """Return exact_match, math_verify, or the user's function with the dotted path ``package.module.function``.

    Raises: `ConfigError` if there is no such function.
    """
    verifier: Verifier = function_named("evaluation.verifier", name, BUILT_IN)
    if name in BUILT_IN:
        return verifier

    @functools.wraps(verifier)
    def verdict(text: str, problem: Problem) -> bool:
        found = plain(verifier(final_part(text), problem))
        if found not in (True, False):  # Python takes "no", (False, reason) and a forgotten await for true
            raise ValueError(f"expected True or False as the verdict, got {found!r:.80}")
        return bool(found)

    return verdict


def verdict_of(verifier: Verifier) -> Callable[[Problem, str | None], bool]:
    """Return the function of a problem and a text that says whether the text is right; None, a cut text, is wrong."""
    return lambda problem, text: text is not None and bool(verifier(text, problem))


def judge(questions: Sequence[tuple[Problem, str | None]], verifier: Verifier, grid: RankGrid) -> list[bool]:
    """Return whether each text answers its problem; None, a truncated text, is wrong.  See `judged_in_order`."""
    return judged_in_order(questions, verdict_of(verifier), grid)


def rewards(questions: Sequence[tuple[Problem, str | None]], reward: Reward, grid: RankGrid) -> list[float]:
    """Return the reward of each text; None, a truncated text, has 0.

    See `judged_in_order`.  Raises: `VerifierError` also for a reward that is not a finite number.
    """

    def rewarded(problem: Problem, text: str | None) -> float:
        return 0.0 if text is None else finite_number(reward(text, problem), "reward")

    return judged_in_order(questions, rewarded, grid, "reward function")


def judged_in_order(
    questions: Sequence[tuple[Problem, Content]],
    judgement: Callable[[Problem, Content], Verdict],
    grid: RankGrid,
    judge_name: str = "verifier",
    *,
    error: type[Exception] = VerifierError,
) -> list[Verdict]:
    """Return the judgement of each of this replica's questions, in their order, equal on all ranks of the replica.

    ``questions``: this replica's (problem, response) pairs, the same in the same order on each of its ranks.
    ``judgement(problem, response)`` gives the verdict.  The ranks share the work, so that no question is judged twice
    and a verifier with a time limit cannot give two ranks different results.  ``judge_name``: what messages call the
    judge.
    Collectives: one all_gather_object over the world, of at most one message of each rank, and those of `in_replica`.
    Raises: ``error`` on every rank if the judgement failed on one rank.
    """
    keyed = dict(enumerate(questions))
    found = in_replica(_judged_here(keyed, judgement, grid, judge_name, error), grid)
    return [found[key] for key in keyed]


def judged_by_all(
    questions: Mapping[Key, tuple[Problem, Content]], judgement: Callable[[Problem, Content], Verdict], grid: RankGrid
) -> dict[Key, Verdict]:
    """Return the verifier's judgement of every question, over all replicas, equal on every rank.

    ``questions``: those of `judged_in_order`, under keys that no other replica has.
    Collectives: one all_gather_object over the world, of at most one message of each rank, and one of the verdicts.
    Raises: `VerifierError` on every rank if the judgement failed on one rank.
    """
    found = _judged_here(questions, judgement, grid, "verifier", VerifierError)
    return {key: verdict for part in gather_objects(found) for key, verdict in part.items()}


def in_replica(found: dict[Key, Verdict], grid: RankGrid) -> dict[Key, Verdict]:
    """Return what all ranks of a replica have ``found``.  Collectives: one all_gather_object in each of its groups."""
    for group in (grid.pp_group, grid.cp_group, grid.tp_group) if grid.replica_size > 1 else ():
        found = {key: one for part in gather_objects(found, group) for key, one in part.items()}
    return found


def _judged_here(
    questions: Mapping[Key, tuple[Problem, Content]],
    judgement: Callable[[Problem, Content], Verdict],
    grid: RankGrid,
    judge_name: str,
    error: type[Exception],
) -> dict[Key, Verdict]:
    """Return this rank's share of the verdicts; raise ``error`` on every rank where a rank has failed."""
    verdicts: dict[Key, Verdict] = {}
    failure: str | None = None
    for key in list(questions)[grid.replica_rank :: grid.replica_size]:
        problem, content = questions[key]
        try:
            verdicts[key] = judgement(problem, content)
            beat()
        except Exception as raised:  # raised below on every rank, so that no rank waits
            reason = f"{type(raised).__name__}: {raised}{own_lines(raised)}"
            failure = f"{problem.location}: the {judge_name} failed with {reason}"[:2000]
            break
    for message in gather_objects(failure):
        if message is not None:
            raise error(message)
    return verdicts


def exact_match(response_text: str, problem: Problem) -> bool:
    r"""Return whether the whole response, or else its final answer, is ``problem.answer``, up to white space.

    The final answer is in the text after the thoughts (`final_part`): the content of the last ``\boxed{..}``; without a
    box, the text after the last ``####``; without both, the last line that is not empty.
    """
    assert problem.answer is not None
    wanted = " ".join(problem.answer.split())
    return wanted in (" ".join(text.split()) for text in (response_text, final_answer(response_text)))


def math_verify(response_text: str, problem: Problem) -> bool:
    """Return whether the response passes `exact_match`, or math-verify finds it equivalent to ``problem.answer``.

    math-verify reads the text after the response's thoughts.  It reads the answer as LaTeX, with or without
    dollars.  Only `exact_match` compares an answer of words alone (``Paris``, ``yes``), since math-verify would read it
    as a product of its letters; the same holds for an answer that math-verify cannot read.  Each parse and each
    comparison ends after MATH_TIMEOUT_SECONDS and then counts as wrong.  A signal enforces this limit, so there is no
    limit outside the main thread.
    """
    assert problem.answer is not None
    if exact_match(response_text, problem):
        return True
    if _WORDS.fullmatch(problem.answer.strip()):
        return False
    from math_verify import parse, verify

    seconds = _seconds()
    wanted = _parsed_answer(problem.answer, seconds)
    if not wanted:
        return False
    found = parse(final_part(response_text), parsing_timeout=seconds)
    return bool(verify(list(wanted), found, timeout_seconds=seconds))


def mentions_answer(response_text: str, problem: Problem) -> bool:
    """Return whether ``problem.answer`` occurs after the thoughts, as whole words or a whole number.

    White space does not count.  The result is False for a problem without an answer.
    """
    wanted = " ".join((problem.answer or "").split())
    text = " ".join(final_part(response_text).split())
    return bool(wanted) and re.search(rf"(?<!\w)(?<!\d\.){re.escape(wanted)}(?!\w)(?!\.\d)", text) is not None


def voted_answer(response_text: str, verifier: Verifier) -> str | None:
    """Return the answer for which a response votes in a majority; equal strings are one answer, and None is no vote.

    With `math_verify`, the vote is the first expression that math-verify reads: a number is rounded to the 6 decimals
    of math-verify's comparison, and any other expression is printed by sympy, so ``1 + x^2`` and ``x^2 + 1`` are one
    answer but ``(x + 1)^2`` and its expansion are two.  With any other verifier, and if nothing can be read within
    MATH_TIMEOUT_SECONDS, the vote is the final answer (`exact_match`) up to white space.
    """
    answer = " ".join(final_answer(response_text).split()) or None
    if verifier is not math_verify or answer is None:
        return answer
    from math_verify import parse
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    seconds = _seconds()
    found = parse(final_part(response_text), parsing_timeout=seconds)
    if not found or isinstance(found[0], str):
        return answer
    try:
        return str(timeout(seconds)(_text_of)(found[0]))
    except (TimeoutException, ValueError, ArithmeticError):  # the number is too large to become text
        return answer


def judged_text(
    response: Response, tokenizer: Tokenizer, confidence: re.Pattern[str] | None
) -> tuple[str, float | None, str]:
    """Return the text of a response, the confidence that it states, and the text that a verifier reads.

    A verifier does not see the statements of confidence: see `split_confidence`, which takes ``confidence``.
    """
    text = response_text(response, tokenizer)
    return (text, *split_confidence(text, confidence))


def right_response(
    verifier: Verifier, tokenizer: Tokenizer, confidence: re.Pattern[str] | None
) -> Callable[[Problem, Response], bool]:
    """Return the function that says whether a response to a problem is right; ``confidence``: see `judged_text`."""

    def judgement(problem: Problem, response: Response) -> bool:
        *_, judged = judged_text(response, tokenizer, confidence)
        return not response.truncated and bool(verifier(judged, problem))

    return judgement


def check_answers(problems: Sequence[Problem], verifier: Verifier) -> None:
    """Raise `ConfigError` if a built-in verifier would find no answer to compare with."""
    unanswered = [problem for problem in problems if problem.answer is None]
    if unanswered and verifier in BUILT_IN.values():
        raise ConfigError(
            f"{unanswered[0].location}: expected an answer that a response can be compared with, got none "
            f"(as in {len(unanswered)} of {len(problems)} problems); set data.fields.answer, "
            "or give a verifier of your own."
        )


# One word of two letters or more, or several words; a formula does not have this form.
_WORDS = re.compile(r"[^\W\d_]{2,}|[^\W\d_]+(\s+[^\W\d_]+)+")

BUILT_IN: dict[str, Verifier] = {"exact_match": exact_match, "math_verify": math_verify}


def final_answer(text: str) -> str:
    """Return the final answer as `exact_match` defines it; "" if there is none."""
    text = final_part(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _seconds() -> int | None:
    """Return the time limit of math-verify; a signal enforces it, which only the main thread can receive."""
    return MATH_TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


def _text_of(expression: Any) -> str:
    """Return a sympy expression as text; equal numbers give equal texts."""
    if not getattr(expression, "is_number", False) or expression.is_Integer or not expression.is_real:
        return str(expression)
    value = round(float(expression), 6)
    if not math.isfinite(value):
        return str(expression)
    return str(int(value) if value.is_integer() else value)


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{..}``; None if there is none."""
    opened: list[int] = []  # where the content of each open brace begins; 0 if it is not of a box
    last = (0, 0)
    for mark in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if mark[0] != "}":
            opened.append(0 if mark[0] == "{" else mark.end())
        elif opened and (start := opened.pop()):
            last = max(last, (start, mark.start()))
    return text[slice(*last)] if last[1] else None


@functools.lru_cache(maxsize=65536)
def _parsed_answer(answer: str, seconds: int | None) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=seconds))
