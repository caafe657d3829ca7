# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts that fit, the shortening of solutions, and the pairing with responses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_selfdistill.data.contexts import (
    ContextCounts,
    ContextPair,
    PromptPair,
    build_contexts,
    fit_teacher_prompt,
    plan_contexts,
)
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.data.tokenizer import load_tokenizer


def problem(text: str, solution: str) -> Problem:
    return Problem(f"{text}/{solution}", ({"role": "user", "content": text},), solution, None, "sums.jsonl:1")


@pytest.fixture(scope="module")
def characters(character_directory: Path, plain_template: str) -> PromptBuilder:
    """Return prompts with one token per character; the teacher's prompt is ``H<solution>|<problem>``."""
    tokenizer = load_tokenizer(character_directory, chat_template=plain_template)
    return PromptBuilder(tokenizer, PromptTemplates(teacher="H{solution}|{problem}"))


@pytest.fixture(scope="module")
def bpe(chat_directory: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(chat_directory), PromptTemplates())


def fit(builder: PromptBuilder, which: Problem, max_length: int, policy: str) -> tuple[str, str, bool] | None:
    pair = fit_teacher_prompt(builder, which, max_length=max_length, max_new_tokens=10, policy=policy)
    if pair is None:
        return None
    decode = builder.tokenizer.decode
    return decode(pair.student_prompt), decode(pair.teacher_prompt), pair.solution_truncated


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_start", "truncate_end"])
def test_what_fits_exactly_is_left_alone(characters: PromptBuilder, policy: str) -> None:
    assert fit(characters, problem("1-1:", "0123"), 20, policy) == ("1-1:", "H0123|1-1:", False)


def test_what_does_not_fit_follows_the_policy(characters: PromptBuilder) -> None:
    long = problem("1-1:", "01234567")
    assert fit(characters, long, 20, "drop") is None
    assert fit(characters, long, 20, "truncate_start") == ("1-1:", "H4567|1-1:", True)
    assert fit(characters, long, 20, "truncate_end") == ("1-1:", "H0123|1-1:", True)
    assert fit(characters, long, 17, "truncate_end") == ("1-1:", "H0|1-1:", True)
    assert fit(characters, long, 16, "truncate_end") is None, "nothing of the solution would be left"
    with pytest.raises(ValueError, match=r"^sums\.jsonl:1: expected a teacher's prompt of .* 10 .*, got 14"):
        fit(characters, long, 20, "error")


def test_what_cannot_be_cut_is_dropped_or_an_error(characters: PromptBuilder) -> None:
    no_room_for_the_frame, long_student = problem("1-1:", "0"), problem("11111111-1:", "0")
    for policy in ("drop", "truncate_start", "truncate_end"):
        assert fit(characters, no_room_for_the_frame, 15, policy) is None
        assert fit(characters, long_student, 20, policy) is None
    with pytest.raises(ValueError, match=r"a student's prompt of at most 10 tokens .* got 11"):
        fit(characters, long_student, 20, "error")


@pytest.mark.parametrize("policy", ["truncate_start", "truncate_end"])
@pytest.mark.parametrize("room", range(66, 90))
def test_a_cut_solution_is_as_long_as_fits_and_stays_text(bpe: PromptBuilder, policy: str, room: int) -> None:
    solution = "first add the units é数 then the tens, \\boxed{42} " * 4
    which = problem("What is the sum?", solution)
    empty = len(bpe.teacher_prompt(which, ""))
    pair = fit_teacher_prompt(bpe, which, max_length=empty + room - 60 + 10, max_new_tokens=10, policy=policy)
    assert pair is not None and pair.solution_truncated
    # Within a token or two of the room: characters outside the vocabulary are three tokens each.
    assert room - 60 - 3 <= len(pair.teacher_prompt) - empty <= room - 60
    text = bpe.tokenizer.decode(pair.teacher_prompt)
    before, after = bpe.tokenizer.decode(bpe.teacher_prompt(which, "@@")).split("@@")
    kept = text.removeprefix(before).removesuffix(after)
    assert kept and "\ufffd" not in text
    assert solution.endswith(kept) if policy == "truncate_start" else solution.startswith(kept)


def test_the_plan_counts_what_was_kept_truncated_and_dropped(characters: PromptBuilder) -> None:
    problems = [problem("1-1:", "0123"), problem("1-1:", "01234"), problem("111111111-1:", "0")]
    pairs, counts = plan_contexts(characters, problems, max_length=20, max_new_tokens=10, policy="truncate_end")
    assert [pair.problem_id for pair in pairs] == ["1-1:/0123", "1-1:/01234"]
    assert counts == ContextCounts(kept=1, truncated=1, dropped=1)
    assert counts + counts == ContextCounts(2, 2, 2)
    _, counts = plan_contexts(characters, problems, max_length=20, max_new_tokens=10, policy="drop")
    assert counts == ContextCounts(kept=1, truncated=0, dropped=2)


def test_impossible_settings_are_refused(characters: PromptBuilder) -> None:
    with pytest.raises(ValueError, match=r"expected one of error, drop, .*truncate_end, got 'cut'"):
        fit(characters, problem("1-1:", "0"), 20, "cut")
    with pytest.raises(ValueError, match="leave room for a prompt"):
        fit(characters, problem("1-1:", "0"), 10, "drop")


@dataclass(frozen=True)
class Sampled:
    token_ids: list[int]
    truncated: bool


def test_contexts_pair_each_response_with_its_prompts() -> None:
    pairs = [PromptPair("a", [1, 2], [1, 2, 3]), PromptPair("b", [4], [5, 6])]
    contexts = build_contexts(pairs, [Sampled([7, 8], False), Sampled([9], True)], guided={"b"})
    assert contexts == [
        ContextPair("a", [1, 2], [1, 2, 3], [7, 8], False),
        ContextPair("b", [4], [5, 6], [9], True, guided=True),
    ]
    assert [(c.student_length, c.teacher_length) for c in contexts] == [(4, 5), (2, 3)]
    with pytest.raises(ValueError, match="got 2 pairs and 1 responses"):
        build_contexts(pairs, [Sampled([7], False)])
