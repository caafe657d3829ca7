# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks for a real model: splits share no problem, verifiers judge texts as documented, and what must stay."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from _lib import retention
from _lib.real_tasks import ONE_SHORT_SENTENCE, SPLITS, TASKS
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.evaluation.verify import load_verifier

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def verdict(name: str, response: str, answer: str | None = None) -> bool:
    """Return the verdict of the verifier of the task ``name``, by the path that a run reads."""
    problem = Problem("1", ({"role": "user", "content": "?"},), "", answer, "file:1")
    return load_verifier(TASKS[name].verifier)(response, problem)


@EVERY_TASK
def test_splits_share_no_problem(task):
    problems = {split: {it["problem"] for seed in (5, 6) for it in task.problems(split, seed)} for split in SPLITS}
    assert all(problems.values())
    assert all(problems[a].isdisjoint(problems[b]) for a, b in combinations(SPLITS, 2))


@EVERY_TASK
def test_the_seed_decides_the_training_problems_and_no_others(task):
    for split in SPLITS:
        records = task.problems(split, 5)
        assert records == task.problems(split, 5)
        assert (records == task.problems(split, 6)) == (split != "train")
        assert len({record["id"] for record in records}) == len(records)
        assert all(record["problem"] and record["solution"] for record in records)


def test_splits_share_no_noun_no_word_and_no_pair_of_numbers():
    def nouns(record):
        return {record["id"].partition("/")[0]}

    def words(record):
        return set(record["answer"].split(", "))

    def factors(record):
        return {frozenset(record["id"].split("x"))}

    for name, parts_of in (("canary", nouns), ("sort_words", words), ("multiplication", factors)):
        made_of = [set().union(*map(parts_of, TASKS[name].problems(split, 5))) for split in SPLITS]
        assert all(a.isdisjoint(b) for a, b in combinations(made_of, 2)), name


@pytest.mark.parametrize("name", ["facts", "sort_words", "word_problems", "multiplication"])
def test_the_solution_alone_is_right_where_it_states_an_answer(name):
    for record in TASKS[name].problems("held_out"):
        assert verdict(name, record["solution"], record["answer"])
        assert not verdict(name, record["problem"], record["answer"]), "the problem is no answer to itself"


def test_half_of_the_hints_name_the_source_and_only_a_response_that_names_it_leaks():
    hints = [record["solution"] for record in TASKS["canary"].problems("train", 5)]
    named = [hint for hint in hints if TASKS["canary"].leak.search(hint)]
    assert {*hints} == {ONE_SHORT_SENTENCE, *named}
    assert (len(named), len({*named})) == (len(hints) // 2, 1)
    others = [task for task in TASKS.values() if task.name not in ("canary", "answer_first")]
    assert all(task.leak.search("As the solution says, it is 7.") for task in others)
    assert not any(task.leak.search("The almanacs of Kessingtons are solutions.") for task in TASKS.values())


def test_every_hint_begins_with_the_answer_and_so_does_a_response_that_leaks():
    task = TASKS["answer_first"]
    for record in task.problems("held_out"):
        assert record["solution"].startswith(f"{record['answer']}. ") and task.leak.search(record["solution"])
        work = record["solution"].partition(". ")[2]
        assert task.leak.search(f"The answer is {work}") and not task.leak.search(f"First, {work}")


VERDICTS = {
    "one_sentence": (
        "",
        [
            "A volcano is a mountain that throws out molten rock.",
            'It is what people call a "mountain of fire."',
            "The U.S. dollar is worth 1.5 times as much, e.g. in Dr. Brown's shop.",
            " ".join(["word"] * 26 + ["of", "the", "last", "sentence."]),
        ],
        [
            *("", ".", "A mountain.", "Hot hot hot hot hot.", "A volcano is a mountain that throws out molten rock"),
            *("A volcano is hot. It can erupt.", "What is that? It is a mountain of fire."),
            *("A volcano is one of these:\n- a mountain\n- an opening.", "Bananas have vitamin C. It is good for you."),
            " ".join(["word"] * 27 + ["of", "the", "last", "sentence."]),
        ],
    ),
    "facts": ("Orla Vinter", ["The mayor is\nOrla  Vinter, of course."], ["", "Orla", "Orla Vinterson", "Vinter Orla"]),
    "sort_words": (
        "apple, fig, pear",
        ["apple, fig, pear", "1. Apple\n2. Fig\n3. Pear", "pear, apple, fig become: apple, fig, pear."],
        ["", "apple, fig", "fig, apple, pear", "apple, fig, pear. Or: pear, fig, apple", "apples, figs, pears"],
    ),
    "word_problems": (
        "56",
        ["56", "7 x 8 = 56.", "It is 56.00", "5 and 6, so 56 pencils"],
        ["", "fifty-six", "56 = 7 x 8", "156", "56.5", "-56"],
    ),
    "multiplication": ("1056", ["The product is 1,056."], ["1,055"]),
}
"""Task -> an answer, the responses that its verifier finds right, and others."""


@pytest.mark.parametrize("name", VERDICTS)
def test_a_verifier_judges_texts_as_documented(name):
    answer, right, wrong = VERDICTS[name]
    assert [text for text in right if not verdict(name, text, answer)] == []
    assert [text for text in wrong if verdict(name, text, answer)] == []


class Counting(torch.nn.Module):
    """A model of 10 tokens that expects the next higher token with probability e^2 / (e^2 + 9)."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=2.0 * torch.nn.functional.one_hot((ids + 1) % 10, 10).float())


def test_perplexity_and_log_probs_are_those_of_the_model():
    right, wrong = 2 - math.log(math.exp(2) + 9), -math.log(math.exp(2) + 9)
    assert retention.perplexity_of(Counting(), [0, 1, 2, 5]) == pytest.approx(math.exp(-(2 * right + wrong) / 3))
    assert retention.mean_log_prob(Counting(), [0, 5], [6, 0]) == pytest.approx((right + wrong) / 2)
