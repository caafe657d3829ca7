# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The calculator of the example: what its tool answers, how episodes end, and how the base model slips."""

from __future__ import annotations

import json
import random

import pytest

from _lib import calculator
from _lib.calculator import Calculator, episode
from _lib.episode_measurement import episodes_of
from _lib.subtraction import answer, columns_of, random_pair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import Reply

PROBLEM = Problem("500-408", ({"role": "user", "content": "500-408:"},), "", "092", "file:1")


@pytest.mark.parametrize(
    ("call", "text"),
    [("T08.", ">2b"), ("T00b", ">9b"), ("T54b", ">0."), ("T54.", ">1."), ("T99.", ">0."), ("T09b", ">0b")],
)
def test_the_tool_subtracts_one_column(call, text):
    assert Calculator().reply(PROBLEM, [call]) == Reply(text, role="tool", done=False)


@pytest.mark.parametrize(
    ("last", "reward"), [(";092", 1.0), (";102", 0.0), ("092", 0.0), ("T08", 0.0), ("T08.T00b", 0.0), ("", 0.0)]
)
def test_any_text_that_is_no_call_ends_the_episode_and_the_right_answer_has_a_reward(last, reward):
    assert Calculator().reply(PROBLEM, ["T08.", ">2b", last]) == Reply(reward=reward, done=True)


def played(a: int, b: int, responses: list[str]) -> tuple[list[str], float]:
    """Return the replies of the environment to these responses, and the last reward."""
    problem, said, shown = Problem(f"{a}-{b}", PROBLEM.messages, "", answer(a, b), "file:1"), [], []
    for response in responses:
        reply = Calculator().reply(problem, [*said, response])
        said += [response, reply.text or ""]
        shown.append(reply)
    assert [reply.done for reply in shown] == [False] * (len(responses) - 1) + [True]
    return [reply.text for reply in shown[:-1]], shown[-1].reward


def test_right_calls_end_with_the_right_answer_and_a_slip_with_a_wrong_one():
    rng = random.Random(0)
    assert episode(500, 408) == (["T08.", "T00b", "T54b", ";092"], [">2b", ">9b", ">0."])
    assert episode(500, 408, rng, 1.0) == (["T80.", "T00.", "T54.", ";108"], [">8.", ">0.", ">1."])
    for _ in range(200):
        a, b = random_pair(rng, "corpus")
        responses, results = episode(a, b)
        assert played(a, b, responses) == (results, 1.0)
        wrong, results = episode(a, b, rng, 1.0)
        assert played(a, b, wrong) == (results, float(wrong == responses))
    assert any(episode(52, 38, rng, 0.5)[0][:2] == ["T28.", "T53."] for _ in range(99)), "a loan is forgotten alone"


def test_a_quarter_of_the_corpus_slips_without_a_hint_and_nothing_after_one():
    rng, lent, in_order = random.Random(1), {False: [], True: []}, {False: [], True: []}
    for _ in range(6000):
        prompt, read, text = calculator.corpus_row(rng)
        assert read == text and text.endswith("$")
        if text[0] != "T":
            continue
        hinted, calls = "H" in prompt, prompt.count("T")
        if prompt.endswith("b"):
            lent[hinted].append(text[3] == "b")
        a, b = map(int, prompt.partition(":")[0].split("-"))
        top, bottom = columns_of(a, b)[calls]
        if top < bottom:
            in_order[hinted].append(text[1:3] == f"{top}{bottom}")
    for found in (lent, in_order):
        assert all(found[True]) and len(found[True]) > 300
        assert 0.72 < sum(found[False]) / len(found[False]) < 0.78


def test_recorded_episodes_are_counted_by_problem_and_sample(tmp_path):
    entries = [("p", 0, 0, 0.0), ("p", 0, 1, 1.0), ("p", 1, 0, 0.0), ("q", 0, 0, 0.0), ("q", 1, 0, None)]
    lines = []
    for problem, sample, turn, reward in entries:
        entry = {"step": 0, "problem_id": problem, "sample_index": sample, "turn": turn}
        lines.append(json.dumps(entry if reward is None else entry | {"reply": {"reward": reward}}))
    (tmp_path / "record.jsonl").write_text("\n".join(lines) + "\n")
    found = episodes_of(tmp_path / "record.jsonl", 0.5)
    assert found.rewards == {"p": [1.0, 0.0], "q": [0.0, 0.0]} and found.turns == [2, 1, 1, 1]
    assert (found.accuracy, found.solved, found.entropy) == (0.25, 0.5, 0.5)
