# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task whose base reads critiques, skills and scores: its corpus, its functions, and the recipes that ask it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from types import SimpleNamespace

import pytest

from _lib import checked_subtraction, pretraining, row_records, subtraction
from _lib.checked_subtraction import conversation, hint, satisfaction, score, skill, summarize
from _lib.checker import Checker, first_wrong_column
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import FEEDBACK_HEADING
from megatron_selfdistill.methods.sdpo import PEER_SECTION

RIGHT, WRONG = "08=2b,00=9b,54=0.;092", "08=2b,00=0.,54=1.;102"
PROBLEM = Problem("500-408", ({"role": "user", "content": "500-408:"},), "", "092", "file:1")


def test_a_demonstration_does_what_its_prompt_tells():
    rng, seen = random.Random(1), {"answer": 0, "peer": 0, "skill": 0, "critique": 0, "question": 0, "plain": 0}
    for _ in range(2000):
        prompt, _, wanted = checked_subtraction.corpus_row(rng)
        numbers, _, rest = prompt.partition(":")
        a, b = map(int, numbers.split("-"))
        text, clean = wanted[:-1], subtraction.work(a, b)[:-1]
        if question := re.fullmatch(r"Q(\d+)\|(.*)\?", rest):
            assert question[1] == subtraction.answer(a, b)
            assert abs(int(text) - score(question[2], a, b, SimpleNamespace(choice=lambda _: 0))) <= 1
            seen["question"] += 1
        elif critique := re.search(r"X(\d)\|?$", rest):
            assert text == clean or first_wrong_column(text, a, b) > int(critique[1])
            seen["critique"] += 1
        elif not rest:
            seen["plain"] += 1
        else:
            told = rest.removeprefix("H").removesuffix("|")
            kinds = {subtraction.answer(a, b): "answer", skill(a, b): "skill", PEER_SECTION.format(clean): "peer"}
            assert text == clean
            seen[kinds[told]] += 1
    shares = {kind: round(count / 2000, 1) for kind, count in seen.items()}
    assert shares == {"answer": 0.1, "peer": 0.1, "skill": 0.1, "critique": 0.2, "question": 0.1, "plain": 0.4}


def test_a_critique_comes_as_a_reply_as_a_hint_and_under_the_heading_of_feedback():
    rng = random.Random(2)
    prompts = [checked_subtraction.corpus_row(rng)[0] for _ in range(1000)]
    critiques = [re.sub(r"X\d\|?$", "", prompt) for prompt in prompts if re.search(r"X\d\|?$", prompt)]
    ends = {f"H{FEEDBACK_HEADING}", ":H"}
    assert all(any(critique.endswith(end) for end in ends) or ";" in critique for critique in critiques)
    assert all(any(critique.endswith(end) for critique in critiques) for end in ends)
    assert any(";" in critique for critique in critiques), "a second attempt follows the first one and its critique"


def test_the_writers_of_hints_say_what_the_checker_says():
    assert skill(500, 408) == "S12" and skill(588, 108) == "S"
    assert summarize(PROBLEM, RIGHT, 1.0) == "S12" and summarize(PROBLEM, WRONG, 0.0) == "X2"
    for attempt in (RIGHT, WRONG):
        *said, reply = conversation(500, 408, attempt)["messages"]
        assert [message["content"] for message in said] == ["500-408:", attempt]
        asked = SimpleNamespace(reply=SimpleNamespace(next_state=[reply]))
        assert hint(PROBLEM, attempt, [reply]) == Checker().reply(PROBLEM, [attempt]).text
        assert satisfaction(attempt, asked) == (1.0 if attempt == RIGHT else -1.0)


def test_a_score_is_nine_for_a_right_response_and_else_twice_its_right_columns_with_an_error_of_one():
    rng = random.Random(3)
    assert {score(RIGHT, 500, 408, rng) for _ in range(50)} == {8, 9}
    assert {score(WRONG, 500, 408, rng) for _ in range(50)} == {1, 2, 3}
    assert {score("", 500, 408, rng) for _ in range(50)} == {0, 1}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["sdpo_feedback", "rltf_fm", "skill_sd", "skald", "openclaw", "ovd", "rlt", "explained"]
)
def test_a_recipe_that_asks_its_base_runs_to_its_end(load_example, root, monkeypatch, name):
    example = load_example("10_recipes")
    few = dataclasses.replace(checked_subtraction.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:8])
    block = dataclasses.replace(example.BLOCKS["checked"], task=dataclasses.replace(few, pretraining_steps=150))
    monkeypatch.setattr(row_records.subtraction, "NUM_TRAINING", 64)
    base = pretraining.make_base(block.task, 5, root / "bases")
    problems = pretraining.write_records(root / "checked.jsonl", subtraction.training_problems(5)[:64])
    outcome = example.run(name, block, base, problems, root, 2)
    figures = example.figures(name, outcome)
    assert figures["step"][-1] == 2 and 0 <= figures["sampled"] <= figures["pass_at_8"] <= 1
    if name in ("rlt", "explained"):
        explained = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        assert explained and all(line["solution"].endswith(f";{line['answer']}") for line in explained)
        assert (root / "rlt_teacher").exists() or name == "explained"
