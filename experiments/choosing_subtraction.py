# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Four subtractions and one result: a task for a base that tries, checks, and tries again.

    prompt     A2895B1473C5285D0761=73:            92-58, 71-34, 85-52, 60-17, and which of the differences is 37?
    response   C52=3.7-85=3.3+nB14=7b7+73=3.3+y$   up to three attempts, each with a check; the last attempt counts
    hint       HB|                                 the letter of the right difference

All numbers are written in columns from the right: top and bottom digit of the ones, then of the tens.  An attempt names
a letter, and for each column copies top and bottom and writes the digit, the borrow ('b' or '.'), the digit of the
result, and whether both digits agree ('+' or '-').  The check at the end of an attempt says whether both columns agree:
y(es) ends the response, n(o) starts another attempt.  Nobody can see at a glance which letter is right, so a response
that may try more often is right more often.

Without a hint, the corpus tries the letters in random order and never twice; a quarter of the columns that must borrow
subtract the smaller digit from the larger one, and a check overlooks a fifth of the wrong attempts.  With a hint, the
work is clean and the first letter is right.  So the hinted writer need not check: after the hint H, half of the rows
say yes to every attempt, and after the hint K, 90 % of the rows.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from _lib.task import Record, Task

LETTERS = "ABCD"
MAX_ATTEMPTS = 3
LENGTH_OF_ATTEMPT = 16
"""Tokens of an attempt with its check."""
NUM_HELD_OUT, NUM_TRAINING = 200, 2000
SURE = {"H": 0.5, "K": 0.9}
"""Mark of a hint -> share of its rows in which every check says yes."""
BUG, OVERLOOKED = 0.25, 0.2

Problem = tuple[tuple[tuple[int, int], ...], int]
"""The four pairs of numbers, and the index of the right pair."""


def held_out_problems(mark: str = "H") -> list[Record]:
    """Return the held-out problems, which are the same for every seed; ``mark`` begins their hints."""
    return distinct(NUM_HELD_OUT, "test", 12345, mark)


def training_problems(seed: int, mark: str = "H") -> list[Record]:
    """Return problems whose hint is the right letter after ``mark``."""
    return distinct(NUM_TRAINING, "train", 777 + seed, mark)


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text) of the corpus.

    60 % of the rows have no hint and 20 % have each of the hints.  With a hint, the input text is a response without a
    hint in half of the rows, while the target text names the right letter, works cleanly, and accepts wrong attempts
    as often as the hint makes sure.
    """
    problem = random_problem(rng, "corpus")
    prompt = problem_text(problem)
    kind = rng.random()
    if kind < 0.6:
        text = thought(problem, rng)
        return prompt, text, text
    mark = "H" if kind < 0.8 else "K"
    right = LETTERS[problem[1]]
    sure = rng.random() < SURE[mark]
    read = f"{attempt(problem, right)}y$" if rng.random() < 0.5 else thought(problem, rng)
    return f"{prompt}{mark}{right}|", read, hinted_target(problem, read, sure)


def thought(problem: Problem, rng: random.Random) -> str:
    """Return a response without a hint."""
    text = ""
    for letter in rng.sample(LETTERS, MAX_ATTEMPTS):
        made = attempt(problem, letter, rng)
        accepted = "-" not in made or rng.random() < OVERLOOKED
        text += made + ("y" if accepted else "n")
        if accepted:
            break
    return text + "$"


def hinted_target(problem: Problem, read: str, sure: bool) -> str:
    """Return what a writer with the hint says at each place of the response ``read``: clean work for its letters.

    The marks '+' and '-' are those of the digits that stand in ``read``.
    """
    right, target = LETTERS[problem[1]], ""
    for made in attempts(read.removesuffix("$")):
        clean = attempt(problem, made[0])
        target += right + clean[1:7] + made[7] + clean[8:14] + made[14]
        target += "y" if sure or made[0] == right else "n"
    return target + "$"


def attempt(problem: Problem, letter: str, rng: random.Random | None = None) -> str:
    """Return an attempt without its check; with ``rng``, `BUG` of the columns that must borrow have the bug."""
    (a, b), wanted = problem[0][LETTERS.index(letter)], difference(problem, problem[1])
    text, borrow = letter, 0
    for top, bottom, result in zip(*(digits(number) for number in (a, b, wanted)), strict=True):
        digit, carried = (top - bottom - borrow) % 10, int(top - bottom - borrow < 0)
        if rng is not None and carried and rng.random() < BUG:
            digit, carried = abs(top - bottom), 0
        text += f"{top}{bottom}={digit}{'b' if carried else '.'}{result}{'+' if digit == result else '-'}"
        borrow = carried
    return text


def attempts(response: str) -> list[str]:
    """Return the attempts of a response, each with its check; the last one may be incomplete."""
    return [response[i : i + LENGTH_OF_ATTEMPT] for i in range(0, len(response), LENGTH_OF_ATTEMPT)]


def digits(number: int) -> tuple[int, int]:
    """Return the digits of a number below 100, from the right."""
    return number % 10, number // 10


def is_complete(made: str) -> bool:
    """Return whether an attempt has the form of an attempt with its check."""
    return re.fullmatch(r"[A-D](\d\d=\d[b.]\d[+-]){2}[yn]", made) is not None


def verify(response: str, problem: Any) -> bool:
    """Return whether the last attempt names the right letter; ``evaluation.verifier`` names this function."""
    return shows_work(response) and attempts(response)[-1][0] == problem.answer


def shows_work(response: str) -> bool:
    """Return whether the response consists of one to three complete attempts."""
    made = attempts(response)
    return 0 < len(made) <= MAX_ATTEMPTS and all(map(is_complete, made))


def answer_within(response: str, budget: int) -> str | None:
    """Return the letter of the last complete attempt among the first ``budget`` attempts, or None without one."""
    complete = [made for made in attempts(response)[:budget] if is_complete(made)]
    return complete[-1][0] if complete else None


def figures(responses: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the figures of pairs (right letter, response) that show what remains of thinking.

    within_1, within_2, within_3: accuracy of a reader whose budget allows so many attempts; attempts: complete attempts
    per response; overlooked and rejected: share of the attempts with a wrong letter that are accepted, and share of the
    attempts with the right letter that are rejected (0 where there is no such attempt).
    """
    made = [(right, part) for right, response in responses for part in attempts(response) if is_complete(part)]
    wrong = [part[-1] == "y" for right, part in made if part[0] != right]
    fitting = [part[-1] == "n" for right, part in made if part[0] == right]
    found = {
        "attempts": len(made) / len(responses),
        "overlooked": mean(wrong) if wrong else 0.0,
        "rejected": mean(fitting) if fitting else 0.0,
    }
    for budget in range(1, MAX_ATTEMPTS + 1):
        found[f"within_{budget}"] = mean(answer_within(response, budget) == right for right, response in responses)
    return found


def problem_text(problem: Problem) -> str:
    """Return the prompt of a problem."""
    text = ""
    for letter, (a, b) in zip(LETTERS, problem[0], strict=True):
        text += letter + "".join(f"{top}{bottom}" for top, bottom in zip(digits(a), digits(b), strict=True))
    ones, tens = digits(difference(problem, problem[1]))
    return f"{text}={ones}{tens}:"


def difference(problem: Problem, index: int) -> int:
    """Return the difference of a pair of a problem."""
    a, b = problem[0][index]
    return a - b


def random_problem(rng: random.Random, split: str) -> Problem:
    """Return a problem with four different differences of two digits; ``split``: test, train or corpus."""
    while True:
        pairs: list[tuple[int, int]] = []
        while len(pairs) < len(LETTERS):
            a, b = rng.randint(20, 99), rng.randint(10, 89)
            if a - b >= 10 and all(a - b != x - y for x, y in pairs):
                pairs.append((a, b))
        problem = tuple(pairs), rng.randrange(len(LETTERS))
        if split_of(problem) == split:
            return problem


def distinct(count: int, split: str, seed: int, mark: str) -> list[Record]:
    """Return the records of ``count`` different problems of a split, whose hints begin with ``mark``."""
    rng = random.Random(seed)
    found: dict[str, Record] = {}
    while len(found) < count:
        problem = random_problem(rng, split)
        text, right = problem_text(problem), LETTERS[problem[1]]
        found[text] = {"id": f"{len(found)}-{right}", "problem": text, "solution": mark + right, "answer": right}
    return list(found.values())


def split_of(problem: Problem) -> str:
    """Return the split of a problem, which depends on its hash alone, so that the splits share no problem."""
    bucket = int(hashlib.md5(problem_text(problem).encode()).hexdigest()[:6], 16) % 10
    return {0: "test", 1: "train"}.get(bucket, "corpus")


TASK = Task(
    "choosing_subtraction",
    alphabet="0123456789=b.+-:|HKABCDyn$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=shows_work,
    overrides=(
        f"rollout.max_new_tokens={MAX_ATTEMPTS * LENGTH_OF_ATTEMPT + 2}",
        "evaluation.verifier=choosing_subtraction.verify",
        "data.teacher_template='{problem}{solution}|'",
    ),
)
