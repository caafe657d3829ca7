# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guidance goes to the problems that the student alone rarely solves, and stops when it solves them."""

from __future__ import annotations

from megatron_selfdistill.rollout.success import PROBE_EVERY, WINDOW, SuccessRates


def visit(rates: SuccessRates, share_alone: float) -> bool:
    """One visit to problem "a"; the mix always solves it.  Returns whether it was guided."""
    guided = rates.guides("a")
    rates.record([("a", guided, 1.0 if guided else share_alone)])
    return guided


def test_a_problem_is_first_written_alone():
    assert not SuccessRates(1.0).guides("never seen")


def test_a_problem_that_is_never_solved_is_guided_but_for_every_fourth_visit():
    rates = SuccessRates(0.3)
    guided = [visit(rates, 0.0) for _ in range(1 + 3 * PROBE_EVERY)]
    assert guided == [False] + 3 * ([True] * (PROBE_EVERY - 1) + [False])


def test_success_under_guidance_ends_no_guidance_and_success_alone_does():
    rates = SuccessRates(0.5)
    visit(rates, 0.0)
    assert all(visit(rates, 0.0) for _ in range(PROBE_EVERY - 1)), "the mix's success is not the student's"
    while not all(not visit(rates, 1.0) for _ in range(2)):
        pass
    assert [visit(rates, 1.0) for _ in range(8)] == [False] * 8


def test_the_rate_is_the_mean_of_the_last_visits_alone():
    rates = SuccessRates(0.5)
    rates.record([("a", False, 1.0)] * 10 + [("a", False, 0.0)] * (WINDOW // 2))
    assert not rates.guides("a"), "half of the last four were right"
    rates.record([("a", False, 0.0)])
    assert rates.guides("a")


def test_problems_do_not_share_their_rates():
    rates = SuccessRates(0.5)
    rates.record([("a", False, 0.0), ("b", False, 1.0)])
    assert rates.guides("a") and not rates.guides("b")


def test_a_restored_table_decides_alike():
    rates, restored = SuccessRates(0.5), SuccessRates(0.5)
    for share in (0.0, 0.25, 0.0):
        visit(rates, share)
    restored.load_state_dict(rates.state_dict())
    assert [visit(rates, 0.0) for _ in range(12)] == [visit(restored, 0.0) for _ in range(12)]
