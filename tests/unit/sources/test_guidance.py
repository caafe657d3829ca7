# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guidance goes to the problems that the student alone rarely solves, and stops when it solves them."""

from __future__ import annotations

from megatron_selfdistill.sources.guidance import PROBE_EVERY, WINDOW, SuccessRates


class Visited:
    """Problem "a", visited again and again; the mix always solves it."""

    def __init__(self, rates: SuccessRates) -> None:
        self.rates = rates

    def visit(self, share_alone: float) -> bool:
        """Record one visit; return whether it was guided."""
        guided = self.rates.guides("a")
        self.rates = self.rates.recorded([("a", guided, 1.0 if guided else share_alone)])
        return guided


def test_a_problem_is_first_written_alone():
    assert not SuccessRates(1.0).guides("never seen")


def test_a_problem_that_is_never_solved_is_guided_but_for_every_fourth_visit():
    problem = Visited(SuccessRates(0.3))
    guided = [problem.visit(0.0) for _ in range(1 + 3 * PROBE_EVERY)]
    assert guided == [False] + 3 * ([True] * (PROBE_EVERY - 1) + [False])


def test_a_visit_without_guidance_leaves_a_rarely_solved_problem_a_guided_one():
    problem = Visited(SuccessRates(0.3))
    assert not problem.rates.is_guided("a"), "its rate is not known yet"
    problem.visit(0.0)
    probes = [(problem.rates.is_guided("a"), problem.visit(0.0)) for _ in range(2 * PROBE_EVERY)]
    assert all(is_guided for is_guided, _ in probes) and [guided for _, guided in probes].count(False) == 2
    for _ in range(WINDOW * PROBE_EVERY):
        problem.visit(1.0)
    assert not problem.rates.is_guided("a")


def test_success_under_guidance_ends_no_guidance_and_success_alone_does():
    problem = Visited(SuccessRates(0.5))
    problem.visit(0.0)
    assert all(problem.visit(0.0) for _ in range(PROBE_EVERY - 1)), "the mix's success is not the student's"
    while not all(not problem.visit(1.0) for _ in range(2)):
        pass
    assert [problem.visit(1.0) for _ in range(8)] == [False] * 8


def test_the_rate_is_the_mean_of_the_last_visits_alone():
    rates = SuccessRates(0.5)
    rates = rates.recorded([("a", False, 1.0)] * 10 + [("a", False, 0.0)] * (WINDOW // 2))
    assert not rates.guides("a"), "half of the last four were right"
    assert rates.recorded([("a", False, 0.0)]).guides("a")
    assert not rates.guides("a"), "rates are a value: a record is another one"


def test_problems_do_not_share_their_rates():
    rates = SuccessRates(0.5).recorded([("a", False, 0.0), ("b", False, 1.0)])
    assert rates.guides("a") and not rates.guides("b")


def test_a_restored_table_decides_alike():
    problem = Visited(SuccessRates(0.5))
    for share in (0.0, 0.25, 0.0):
        problem.visit(share)
    restored = Visited(SuccessRates(0.5).restored(problem.rates.state_dict()))
    assert [problem.visit(0.0) for _ in range(12)] == [restored.visit(0.0) for _ in range(12)]
