# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whether a response is right: verifiers that compare its final answer with the problem's, or one of the user's."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_selfdistill.config import function_named
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.errors import ConfigError, VerifierError

if TYPE_CHECKING:  # verifiers are also used where there is no Megatron
    from megatron_selfdistill.distributed.ranks import RankGrid

Key = TypeVar("Key", bound=Hashable)
Said = TypeVar("Said")
Verdict = TypeVar("Verdict")

Verifier = Callable[[str, Problem], bool]
"""``verify(response_text, problem)``: whether the response, without its stop token, is right."""

MATH_TIMEOUT_SECONDS = 5


def load_verifier(name: str) -> Verifier:
    """exact_match, math_verify, or a function of the user's by its dotted path, ``package.module.function``.

    Raises: ConfigError in one sentence if there is no such function.
    """
    return function_named("evaluation.verifier", name, BUILT_IN)


def judge(questions: Mapping[Key, tuple[Problem, str | None]], verifier: Verifier, grid: RankGrid) -> dict[Key, bool]:
    """Whether each text answers its problem, over all replicas, equal on every rank; None (a truncated one) is wrong.

    See `judged_by_all`.
    """
    return judged_by_all(questions, lambda problem, text: text is not None and bool(verifier(text, problem)), grid)


def judged_by_all(
    questions: Mapping[Key, tuple[Problem, Said]], judgement: Callable[[Problem, Said], Verdict], grid: RankGrid
) -> dict[Key, Verdict]:
    """``judgement(problem, what was said)`` of every question, over all replicas, equal on every rank.

    ``questions``: this replica's, the same and in the same order on each of its ranks, under keys that no other replica
    has.  The ranks share the work: so nothing is judged twice, and a verifier with a time limit cannot give two ranks
    different results.
    Collectives: one all_gather_object over the world.
    Raises: VerifierError, the same on every rank, where the verifier failed on one.
    """
    num_ranks = grid.tp_size * grid.cp_size * grid.pp_size
    rank = (grid.pp_rank * grid.cp_size + grid.cp_rank) * grid.tp_size + grid.tp_rank
    verdicts: dict[Key, Verdict] = {}
    failure = None
    for key, (problem, said) in list(questions.items())[rank::num_ranks]:
        try:
            verdicts[key] = judgement(problem, said)
        except Exception as error:  # raised below, on every rank: alone, it would leave the others waiting
            failure = f"{problem.location}: the verifier failed with {type(error).__name__}: {error}"
            break
    gathered = gather_objects((verdicts, failure))
    failures = [message for _, message in gathered if message is not None]
    if failures:
        raise VerifierError(failures[0])
    return {key: verdict for part, _ in gathered for key, verdict in part.items()}


def exact_match(response_text: str, problem: Problem) -> bool:
    """Whether the response as a whole, or else its final answer, is ``problem.answer``, white space aside.

    The final answer is what stands after the last ``</think>``, and there, of these the first that occurs:
    what the last ``\\boxed{..}`` holds; what follows the last ``####``; the last line that is not empty.
    """
    assert problem.answer is not None
    wanted = " ".join(problem.answer.split())
    return wanted in (" ".join(text.split()) for text in (response_text, final_answer(response_text)))


def math_verify(response_text: str, problem: Problem) -> bool:
    """Return whether the response passes `exact_match`, or math-verify takes what follows its last ``</think>`` to mean
    the same as ``problem.answer``.

    The answer is read as LaTeX, with or without dollars.  An answer of words alone (``Paris``, ``yes``) is compared by
    `exact_match` only, since math-verify would read it as a product of its letters; so is one that it cannot read.
    Each parse and each comparison ends after MATH_TIMEOUT_SECONDS and then counts as wrong; a signal does that, so
    outside the main thread there is no time limit.
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
    found = parse(_after_thinking(response_text), parsing_timeout=seconds)
    return bool(verify(list(wanted), found, timeout_seconds=seconds))


def mentions_answer(response_text: str, problem: Problem) -> bool:
    """Return whether ``problem.answer`` occurs in what follows the last ``</think>``, as whole words or a whole number.

    White space does not count.  False for a problem without an answer.
    """
    wanted = " ".join((problem.answer or "").split())
    text = " ".join(_after_thinking(response_text).split())
    return bool(wanted) and re.search(rf"(?<!\w)(?<!\d\.){re.escape(wanted)}(?!\w)(?!\.\d)", text) is not None


def voted_answer(response_text: str, verifier: Verifier) -> str | None:
    """What a response votes for where the most frequent answer wins; equal strings are one answer, None is no vote.

    With `math_verify`: the first expression that math-verify reads, a number rounded as it compares numbers (to 6
    decimals), any other as sympy writes it, so ``1 + x^2`` and ``x^2 + 1`` are one answer but ``(x + 1)^2`` and its
    expansion are two.  With any other verifier, and where nothing can be read (or not within MATH_TIMEOUT_SECONDS):
    the final answer (`exact_match`), white space aside.
    """
    answer = " ".join(final_answer(response_text).split()) or None
    if verifier is not math_verify or answer is None:
        return answer
    from math_verify import parse
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    seconds = _seconds()
    found = parse(_after_thinking(response_text), parsing_timeout=seconds)
    if not found or isinstance(found[0], str):
        return answer
    try:
        return timeout(seconds)(_written)(found[0])
    except (TimeoutException, ValueError, ArithmeticError):  # too large to be written out
        return answer


def check_answers(problems: Sequence[Problem], verifier: Verifier) -> None:
    """Raises: ConfigError in one sentence where a built-in verifier would find no answer to compare with."""
    unanswered = [problem for problem in problems if problem.answer is None]
    if unanswered and verifier in BUILT_IN.values():
        raise ConfigError(
            f"{unanswered[0].location}: expected an answer that a response can be compared with, got none "
            f"(as in {len(unanswered)} of {len(problems)} problems); set data.fields.answer, "
            "or give a verifier of your own."
        )


# One word of two letters or more, or several words: nothing that a formula would be.
_WORDS = re.compile(r"[^\W\d_]{2,}|[^\W\d_]+(\s+[^\W\d_]+)+")

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


def _seconds() -> int | None:
    """How long math-verify may take; a signal ends it, which only the main thread can have."""
    return MATH_TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


def _written(expression: Any) -> str:
    """A sympy expression; equal numbers are written alike."""
    if not getattr(expression, "is_number", False) or expression.is_Integer or not expression.is_real:
        return str(expression)
    value = round(float(expression), 6)
    if not math.isfinite(value):
        return str(expression)
    return str(int(value) if value.is_integer() else value)


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
