# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tasks for a real model: splits share no problem, verifiers judge texts as documented, and what must stay."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from explored_records import logit_rows, record_of

from _lib import real_tasks, retention
from _lib.explored import about_the_largest_loss, likeliest
from _lib.real_tasks import SPLITS, TASKS
from megatron_selfdistill import config as configuration
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.evaluation.verify import load_verifier
from megatron_selfdistill.loss import Target

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


def test_a_misspelt_split_and_a_doubled_item_are_refused():
    with pytest.raises(ValueError, match="expected a split of train, validation, held_out, got 'test'"):
        TASKS["facts"].problems("test")
    with pytest.raises(ValueError, match="got one of them twice"):
        real_tasks.part([1, 2, 1], "train")


def test_parts_are_the_whole_list():
    items = list(range(133))
    parts = {split: real_tasks.part(items, split) for split in SPLITS}
    assert sorted(item for found in parts.values() for item in found) == items
    assert {split: len(found) for split, found in parts.items()} == {"train": 101, "validation": 16, "held_out": 16}


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


def test_the_sizes_of_the_tasks():
    sizes = {name: [len(task.problems(split)) for split in SPLITS] for name, task in TASKS.items()}
    assert sizes == {
        "one_sentence": [400, 64, 64],
        "facts": [96, 48, 48],
        "sort_words": [400, 64, 64],
        "word_problems": [400, 64, 64],
        "multiplication": [90, 16, 15],
    }


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


def test_facts_are_the_same_in_all_splits_and_names_are_unique():
    facts = [{it["solution"] for it in TASKS["facts"].problems(split)} for split in SPLITS]
    assert facts[0] == facts[1] == facts[2]
    names = Counter(it["answer"] for it in TASKS["facts"].problems("held_out"))
    assert max(names.values()) == 1


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


def test_words_are_never_shown_in_order():
    for record in TASKS["sort_words"].problems("train", 5):
        assert record["answer"] not in record["problem"]
        assert record["answer"].split(", ") == sorted(record["answer"].split(", "))


def test_the_last_number_counts():
    for right in ("56", "7 x 8 = 56.", "It is 56.00", "5 and 6, so 56 pencils"):
        assert verdict("word_problems", right, "56"), right
    assert verdict("multiplication", "The product is 1,056.", "1056")
    for wrong in ("", "fifty-six", "56 = 7 x 8", "156", "56.5", "-56"):
        assert not verdict("word_problems", wrong, "56"), wrong


def test_worked_solutions_calculate_right_and_end_above_0():
    records = [record for split in SPLITS for record in TASKS["word_problems"].problems(split)]
    assert len(records) == 528
    for record in records:
        steps = re.findall(r"(\d+) ([x+-]) (\d+) = (-?\d+)", record["solution"])
        assert len(steps) == 2
        for left, operator, right, result in steps:
            a, b = int(left), int(right)
            assert {"x": a * b, "+": a + b, "-": a - b}[operator] == int(result) > 0


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


def test_repetition_is_a_share_of_4_grams():
    assert retention.repeated_share([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert retention.repeated_share([1] * 8) == pytest.approx(4 / 5)
    assert retention.repeated_share([1, 2, 3]) == 0.0


def test_the_general_questions_are_50_and_no_problems_of_a_task():
    problems = {it["problem"] for task in TASKS.values() for split in SPLITS for it in task.problems(split)}
    assert len(set(retention.QUESTIONS)) == 50
    assert problems.isdisjoint(retention.QUESTIONS)
    assert 300 < len(retention.TEXT.split()) < 600


def test_a_sentence_says_where_the_teacher_would_have_stopped_and_only_there():
    student, teacher, _ = logit_rows(80, 40, 3)
    at, end = 70, 9
    teacher[at] = student[at] - 5.0  # the student's largest surprise, in the second block of the record
    teacher[at, end] = student[at].max() + 20.0
    record = record_of([student, teacher], Target(anchor="student"))
    losses = record["tokens"]["loss"]
    assert losses.index(max(losses)) == at and likeliest(record, at) == end
    assert likeliest(record, 3) == int(teacher[3].argmax())
    sentence = about_the_largest_loss(record, end)
    assert sentence is not None and "would have stopped before this token" in sentence
    assert repr(record["tokens"]["text"][at]) in sentence and about_the_largest_loss(record, end + 1) is None
