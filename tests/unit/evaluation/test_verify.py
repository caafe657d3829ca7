# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The verifiers compare final answers, and a verifier of the user is found by its dotted path."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import problem_with

from megatron_selfdistill.evaluation import verify as module
from megatron_selfdistill.evaluation.verify import exact_match, load_verifier, math_verify, voted_answer


@pytest.mark.parametrize(
    ("response", "by_text", "by_meaning"),
    [
        ("so\n  4  2 ", "4 2", "2"),
        ("it is 0.5", "it is 0.5", "0.5"),
        (r"\boxed{2.0}", "2.0", "2"),
        (r"\boxed{1/3}", "1/3", "0.333333"),
        (r"\boxed{1+x^2}", "1+x^2", "x**2 + 1"),
        (r"\boxed{1} </think> \boxed{2}", "2", "2"),
        ("who knows", "who knows", "who knows"),
        ("  ", None, None),
    ],
)
def test_a_response_votes_for_its_final_answer(response, by_text, by_meaning):
    assert voted_answer(response, exact_match) == by_text
    assert voted_answer(response, math_verify) == by_meaning


def test_a_number_too_large_to_write_out_is_a_vote_of_its_own():
    answers = [voted_answer(rf"\boxed{{{text}}}", math_verify) for text in ("9999999!", "9999998!", "2^{20000}")]
    assert len(set(answers)) == 3 and None not in answers


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("  092\n", " 092 ", True),
        ("092", "92", False),
        ("first 1\nthen 2\n\n42\n", "42", True),
        ("42\nthen 2", "42", False),
        (r"so \boxed{41}, no, \boxed{42}. Done", "42", True),
        (r"so \boxed{42}, no, \boxed{41}" + "\n42", "42", False),
        (r"\boxed{42} or \boxed{4", "42", True),
        ("3 + 4 = 7\n#### 7", "7", True),
        ("#### 7\n#### 8", "7", False),
        ("42\n</think>\nno idea", "42", False),
        (r"\boxed{7}</think> it is" + "\n42", "42", True),
        ("a  b\nc", "a b c", True),
    ],
)
def test_exact_match_compares_the_final_answer(response, answer, right):
    assert exact_match(response, problem_with(answer)) is right


PARTS = [r"\boxed{", r"\boxed{}", "\\boxed    ", "{", "<think>", "</think>", "<|channel|>final", "#### ", "\n"]


@pytest.mark.parametrize("part", PARTS)
def test_a_response_costs_a_time_proportional_to_its_length(part):
    """The texts have up to a million characters; a scan that is not linear takes minutes for some of them."""
    assert exact_match(part * 100_000 + r"\boxed{42}", problem_with("42")) is (part != "<think>")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so it is $\frac{1}{2}$", "1/2", True),
        (r"\boxed{1+x^2}", "x^2+1", True),
        (r"\boxed{1+x^3}", "x^2+1", False),
        ("the answer is 12345", "12,345", True),
        (r"\boxed{2^{1/2}}", r"$\sqrt{2}$", True),
        (r"\boxed{42}</think> it is 41", "42", False),
        (r"$\boxed{\text{Monday}}$", r"\text{Monday}", True),
        ("85 + 78 = 163, so the answer is 163.", "163", True),
        ("85 + 78 = 163, so the answer is 163.", "85", False),
        ("#### 7", "7.0", True),
        (r"it is \boxed{Paris}", "Paris", True),
        (r"it is \boxed{Spair}", "Paris", False),
        ("It is Paris.", "Paris", False),
        ("so\n12:30", "12:30", True),
        (r"\boxed{2 y}", "2y", True),
    ],
)
def test_math_verify_compares_what_is_meant(response, answer, right):
    assert math_verify(response, problem_with(answer)) is right


def test_math_verify_gives_up_on_an_expression_that_takes_for_ever_and_works_in_a_thread(monkeypatch):
    monkeypatch.setattr(module, "MATH_TIMEOUT_SECONDS", 1)
    assert math_verify(r"\boxed{9999999!}", problem_with("42")) is False
    with ThreadPoolExecutor() as pool:
        assert pool.submit(math_verify, "it is 42", problem_with("42")).result()


def test_a_verdict_of_a_user_may_be_a_number_or_of_another_library_but_is_true_or_false(monkeypatch):
    true, neither = [True, 1.0, np.bool_(True), torch.tensor(True)], ["no", (False, "reason"), None, 0.5]
    monkeypatch.setattr(module, "of_a_user", lambda text, problem: verdicts[int(text)], raising=False)
    verify, verdicts = load_verifier(f"{module.__name__}.of_a_user"), [*true, *neither]
    assert [verify(str(i), problem_with(None)) for i in range(len(true))] == [True] * 4
    for i in range(len(true), len(verdicts)):
        with pytest.raises(ValueError, match="verdict"):
            verify(str(i), problem_with(None))


def test_an_answer_is_mentioned_as_whole_words_or_a_whole_number():
    number, fraction = problem_with("163"), problem_with(r"\frac{1}{2}")
    assert module.mentions_answer("so the answer is 163.", number)
    assert module.mentions_answer("so  New\nYork!", problem_with("New York"))
    assert module.mentions_answer(r"it is \frac{1}{2}.", fraction)
    for response in ("1631 or 0.163 or 163.5 or x163", "163</think> no idea", ""):
        assert not module.mentions_answer(response, number)
    assert not module.mentions_answer("anything", problem_with(None))
