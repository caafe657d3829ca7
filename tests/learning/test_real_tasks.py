# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks for a real model: splits share no problem, verifiers judge texts as documented, and what must stay."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from _lib import retention
from _lib.real_tasks import SPLITS, TASKS
from megatron_selfdistill import config as configuration
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

    for name, parts_of in (("one_sentence", nouns), ("sort_words", words), ("multiplication", factors)):
        made_of = [set().union(*map(parts_of, TASKS[name].problems(split, 5))) for split in SPLITS]
        assert all(a.isdisjoint(b) for a, b in combinations(made_of, 2)), name


@EVERY_TASK
def test_the_settings_of_a_task_are_settings_of_a_run(task):
    config = configuration.load([*task.overrides, "run_dir=runs/none"])
    assert config.rollout.max_new_tokens == task.max_new_tokens
    assert config.data.teacher_template == task.teacher_template
    assert config.evaluation.verifier == task.verifier


@EVERY_TASK
def test_the_solution_alone_is_right_where_it_states_an_answer(task):
    if task.name == "one_sentence":  # whose solution is an instruction
        return
    for record in task.problems("held_out"):
        assert verdict(task.name, record["solution"], record["answer"])
        assert not verdict(task.name, record["problem"], record["answer"]), "the problem is no answer to itself"


@pytest.mark.parametrize(
    "sentence",
    [
        "A volcano is a mountain that throws out molten rock.",
        "  A volcano is hot inside!\n",
        'It is what people call a "mountain of fire."',
        "The U.S. dollar is worth 1.5 times as much, e.g. in Dr. Brown's shop.",
        " ".join(["word"] * 26 + ["of", "the", "last", "sentence."]),
    ],
)
def test_one_short_sentence_is_right(sentence):
    assert verdict("one_sentence", sentence)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing"),
        (".", "no word"),
        ("A mountain.", "two words"),
        ("Hot hot hot hot hot.", "one word, five times"),
        ("A volcano is a mountain that throws out molten rock", "no end"),
        ("A volcano is hot. It can erupt.", "two sentences"),
        ("What is that? It is a mountain of fire.", "two sentences"),
        ("A volcano is one of these:\n- a mountain\n- an opening.", "a list"),
        ("Bananas have vitamin C. It is good for you.", "the single letter is no abbreviation"),
        (" ".join(["word"] * 27 + ["of", "the", "last", "sentence."]), "31 words"),
    ],
)
def test_other_texts_are_not_one_short_sentence(text, why):
    assert not verdict("one_sentence", text), why


def test_a_name_is_found_as_whole_words():
    assert verdict("facts", "The mayor is\nOrla  Vinter, of course.", "Orla Vinter")
    for wrong in ("", "Orla", "Orla Vinterson", "Vinter Orla"):
        assert not verdict("facts", wrong, "Orla Vinter"), wrong


def test_the_last_mentions_of_the_words_count():
    answer = "apple, fig, pear"
    for right in (answer, "1. Apple\n2. Fig\n3. Pear", "pear, apple, fig become: apple, fig, pear."):
        assert verdict("sort_words", right, answer), right
    for wrong in (
        "",
        "apple, fig",
        "fig, apple, pear",
        "apple, fig, pear. Or: pear, fig, apple",
        "apples, figs, pears",
    ):
        assert not verdict("sort_words", wrong, answer), wrong


def test_the_last_number_counts():
    for right in ("56", "7 x 8 = 56.", "It is 56.00", "5 and 6, so 56 pencils"):
        assert verdict("word_problems", right, "56"), right
    assert verdict("multiplication", "The product is 1,056.", "1056")
    for wrong in ("", "fifty-six", "56 = 7 x 8", "156", "56.5", "-56"):
        assert not verdict("word_problems", wrong, "56"), wrong


# -- what must stay -------------------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """A model of 10 tokens that expects the next higher token with probability e^2 / (e^2 + 9)."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=2.0 * torch.nn.functional.one_hot((ids + 1) % 10, 10).float())


def test_perplexity_and_log_probs_are_those_of_the_model():
    right, wrong = 2 - math.log(math.exp(2) + 9), -math.log(math.exp(2) + 9)
    assert retention.perplexity_of(Counting(), [0, 1, 2, 5]) == pytest.approx(math.exp(-(2 * right + wrong) / 3))
    assert retention.mean_log_prob(Counting(), [0, 5], [6, 0]) == pytest.approx((right + wrong) / 2)
