# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The calculator of the example: what its tool answers, and how episodes end."""

from __future__ import annotations

import random

from _lib.calculator import Calculator, episode
from _lib.subtraction import answer, random_pair
from megatron_selfdistill.data.problems import Problem

PROBLEM = Problem("500-408", ({"role": "user", "content": "500-408:"},), "", "092", "file:1")


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
