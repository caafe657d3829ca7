# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task whose base reads critiques, skills and scores: its functions, and the recipes that ask it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from _lib import checked_subtraction, pretraining, row_records, subtraction
from _lib.checked_subtraction import conversation, hint, satisfaction, skill, summarize
from _lib.checker import Checker
from megatron_selfdistill.data.problems import Problem

RIGHT, WRONG = "08=2b,00=9b,54=0.;092", "08=2b,00=0.,54=1.;102"
PROBLEM = Problem("500-408", ({"role": "user", "content": "500-408:"},), "", "092", "file:1")


def test_the_writers_of_hints_say_what_the_checker_says():
    assert skill(500, 408) == "S12" and skill(588, 108) == "S"
    assert summarize(PROBLEM, RIGHT, 1.0) == "S12" and summarize(PROBLEM, WRONG, 0.0) == "X2"
    for attempt in (RIGHT, WRONG):
        *said, reply = conversation(500, 408, attempt)["messages"]
        assert [message["content"] for message in said] == ["500-408:", attempt]
        asked = SimpleNamespace(reply=SimpleNamespace(next_state=[reply]))
        assert hint(PROBLEM, attempt, [reply]) == Checker().reply(PROBLEM, [attempt]).text
        assert satisfaction(attempt, asked) == (1.0 if attempt == RIGHT else -1.0)


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
