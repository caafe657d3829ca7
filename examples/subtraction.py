# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Three-digit column subtraction as pupils write it, bugs included: the task of the quickstart.

    prompt     500-408:
    response   08=2b,00=9b,54=0.;092$     columns from the right: top, bottom, '=', digit, b(orrow) or '.'; answer; end
    hint       H092|                      the answer alone: no work to imitate

The base model's corpus subtracts the smaller digit from the larger in a quarter of the borrow columns, and says
0 - N = N in three quarters of those with a zero on top.  Demonstrations that follow a hint are clean.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

ALPHABET = "0123456789-=b.,;:|HX~$_"  # '$' ends a text, '_' pads
NUM_DIGITS = 3
TEACHER_TEMPLATE = "{problem}H{solution}|"

Pair = tuple[int, int]


def draw(rng: random.Random, split: str) -> Pair:
    """a >= b with at least one borrow and many zeros on top, of ``split`` test, train or corpus."""
    while True:
        top = [0 if rng.random() < 0.25 else rng.randrange(10) for _ in range(NUM_DIGITS)]
        bottom = [rng.randrange(10) for _ in range(NUM_DIGITS)]
        a, b = int("".join(map(str, top))), int("".join(map(str, bottom)))
        if a >= b and any(x < y for x, y in zip(top, bottom, strict=True)) and split_of(a, b) == split:
            return a, b


def split_of(a: int, b: int) -> str:
    """By hash, so that no problem is in two splits: 0 is the test, 1 the problems with hints, the rest the corpus."""
    bucket = int(hashlib.md5(f"{a}-{b}".encode()).hexdigest()[:6], 16) % 10
    return {0: "test", 1: "train"}.get(bucket, "corpus")


def distinct(count: int, split: str, seed: int) -> list[Pair]:
    """``count`` different problems of a split."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[draw(rng, split)] = None
    return list(found)


def problem_text(a: int, b: int) -> str:
    return f"{a:0{NUM_DIGITS}d}-{b:0{NUM_DIGITS}d}:"


def answer(a: int, b: int) -> str:
    return f"{a - b:0{NUM_DIGITS}d}"


def work(
    a: int, b: int, rng: random.Random | None = None, bug: float = 0.0, zero_bug: float = 0.0, slip: float = 0.0
) -> str:
    """The columns and the answer.  ``bug``: smaller from larger; ``zero_bug``: 0 - N = N; ``slip``: a random digit."""
    columns, digits, borrow = [], [], 0
    for t, u in zip(reversed(f"{a:0{NUM_DIGITS}d}"), reversed(f"{b:0{NUM_DIGITS}d}"), strict=True):
        top, bottom = int(t), int(u)
        needs = top - bottom - borrow < 0
        digit, carried = (top - bottom - borrow) % 10, int(needs)
        if rng is not None and needs and rng.random() < (zero_bug if top == 0 else bug):
            digit, carried = abs(top - bottom), 0
        if rng is not None and slip and rng.random() < slip:
            digit = rng.randrange(10)
        columns.append(f"{top}{bottom}={digit}{'b' if carried else '.'}")
        digits.append(str(digit))
        borrow = carried
    return ",".join(columns) + ";" + "".join(reversed(digits)) + "$"


def verify(response: str, problem) -> bool:  # type: ignore[no-untyped-def]
    """The answer after the one ';' is right.  The verifier of examples and tests (``evaluation.verifier``)."""
    text = response.rstrip("$")
    return text.count(";") == 1 and text.split(";")[1] == problem.answer


def shows_work(response: str) -> bool:
    """All columns are written out before the answer."""
    return ";" in response and response.count(",") == NUM_DIGITS - 1


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, text to read, text to predict): 65 % buggy without a hint, 15 % after the whole solution as a hint, 20 %
    after the answer alone.  Behind a hint the text to read is a sloppy draft in 60 % of the rows while the text to
    predict stays clean: a teacher must have seen prefixes that are wrong."""
    a, b = draw(rng, "corpus")
    kind, prompt = rng.random(), problem_text(a, b)
    if kind < 0.65:
        text = work(a, b, rng, bug=0.25, zero_bug=0.75)
        return prompt, text, text
    hint = work(a, b)[:-1] if kind < 0.80 else answer(a, b)
    clean = work(a, b)
    draft = work(a, b, rng, bug=0.4, zero_bug=0.6, slip=0.1) if rng.random() < 0.6 else clean
    return f"{prompt}H{hint}|", draft, clean


def write_problems(path: Path, pairs: list[Pair], solution=answer) -> None:  # type: ignore[no-untyped-def]
    """JSONL as ``data.path`` takes it; ``solution(a, b)`` is the hint."""
    with path.open("w") as lines:
        for a, b in pairs:
            record = {"id": f"{a}-{b}", "problem": problem_text(a, b), "solution": solution(a, b), "answer": answer(a, b)}
            lines.write(json.dumps(record) + "\n")


def write_tokenizer(folder: Path, alphabet: str = ALPHABET) -> None:
    """A Hugging Face tokenizer with one token per character, whose chat template is the text itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token="_", unk_token="_")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)
