# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ranks of a self-test meet after every check, and ranks that hang or raise end it with a message."""

from __future__ import annotations

import os
import re
import time

import pytest
from forks import in_a_fork
from selftest_table import CHECKS, verdicts

from megatron_selfdistill.instruments.doctor import doctor_command as doctor
from megatron_selfdistill.instruments.selftest.meeting import LIMIT_S, Meeting
from megatron_selfdistill.instruments.selftest.outcome import Figure, Outcome

pytestmark = pytest.mark.timing


def sound(*arguments: object) -> Outcome:
    return Outcome((Figure("a figure", 0.0, 1.0),))


def print_outcome(outcome: Outcome) -> None:
    print(outcome.name, "|", outcome.error)


def left_after_the_others_were_done() -> tuple[float, float, bool]:
    """Return when this rank's check returned and when its groups ended; rank 1's check takes longer."""
    from megatron_selfdistill.instruments.selftest import meeting as module

    rank, times = int(os.environ["RANK"]), []

    def check() -> Outcome:
        time.sleep(0.5 * rank)
        times.append(time.monotonic())
        return Outcome((Figure("a figure", float(rank), 0.5),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POLL_S", 0.02 + 0.5 * rank)  # rank 1 reads what it needs when rank 0 is long done
        with module.Meeting(rank, 2, broken_off=lambda outcome: None) as meeting:
            outcome = meeting.hold("slow", check, leave=lambda: times.append(time.monotonic()))
    return times[0], times[1], outcome.passed


def test_no_rank_ends_its_groups_while_another_still_computes_and_all_have_the_worst_figure(ranks):
    outcomes = ranks.run(left_after_the_others_were_done, world_size=2, init_process_group=False)
    last_done = max(done for done, _, _ in outcomes)
    assert all(left >= last_done for _, left, _ in outcomes)
    assert not any(passed for *_, passed in outcomes), "rank 1's figure is out of its bound on both"


def meet(what: str, limit_s: float, share: float) -> None:
    """Hold a check from which rank 1 never returns, or in which rank 1 raises and rank 0 never returns."""
    rank = int(os.environ["RANK"])

    def check() -> Outcome:
        if rank == 1 and what == "raises":
            raise OSError("no space left")
        if rank == 1 or what == "raises":
            time.sleep(1000)  # longer than the test waits
        return sound()

    with Meeting(rank, 2, print_outcome, limit_s=limit_s, grace_s=1.0) as meeting:
        print(meeting.hold("sound", sound, leave=lambda: None).passed)
        meeting.hold("deaf", check, leave=lambda: None, share=share)


@pytest.mark.parametrize(
    ("what", "limit_s", "share", "message"),
    [
        ("hangs", 2000.0, 0.001, r"deaf \| rank 1 did not return from this check within 2 s \(--minutes .*\)"),
        ("raises", 500.0, 0.5, r"deaf \| rank 1: OSError: no space left; then rank 0 did not return within 1 s"),
    ],
)
def test_ranks_that_never_return_are_named_and_all_processes_end(ranks, what, limit_s, share, message):
    ended = ranks.run(in_a_fork, meet, what, limit_s, share, world_size=2, init_process_group=False)
    assert [status for status, _ in ended] == [1, 1]
    assert re.fullmatch(f"True\n{message}\n", ended[0][1]) and ended[1][1] == "True\n", ended


def hasty_selftest(hanging: int, limit_s: float, slow: bool) -> None:
    """Run a self-test whose first check takes 5 seconds; one check, and the start if ``slow``, never return."""
    from megatron_selfdistill.instruments.selftest import node_test

    names = list(node_test.CHECKS)
    node_test.warm_up = lambda launch, phase: None
    node_test.CHECKS = dict.fromkeys(names, sound)
    node_test.CHECKS[names[0]] = lambda launch: time.sleep(5.0) or sound()
    node_test.CHECKS[names[hanging]] = lambda launch: time.sleep(1000)
    node_test.write_texts = lambda directory: time.sleep(1000 * slow)
    node_test.selftest("megatron", limit_s=limit_s)


@pytest.mark.parametrize(
    ("hanging", "limit_s", "slow", "first"),
    [
        pytest.param(  # half of what is left
            2, 20.0, False, "did not return from this check within [0-7] s", marks=pytest.mark.full
        ),
        pytest.param(  # all that is left
            5, 20.0, False, "did not return from this check within ([0-9]|1[0-5]) s", marks=pytest.mark.full
        ),
        (5, 2.0, True, "not reached: rank 0 did not come to it within the self-test's 2 s"),
    ],
)
def test_one_clock_ends_all_checks_and_the_table_says_what_was_not_reached(ranks, hanging, limit_s, slow, first):
    [(status, table)] = ranks.run(
        in_a_fork, hasty_selftest, hanging, limit_s, slow, world_size=1, init_process_group=False
    )
    assert status == 1, table
    reached = [] if slow else CHECKS[:hanging]
    assert verdicts(table) == dict.fromkeys(CHECKS, "FAILURE") | dict.fromkeys(reached, "ok"), table
    assert re.search(first, table), table
    assert table.count("-> not reached") == len(CHECKS) - len(reached) - (not slow)
    last = table.splitlines()[-1]
    assert last.startswith(f"{len(CHECKS) - len(reached)} of 6 checks failed in "), last


def test_by_default_a_warm_node_has_less_than_three_minutes_and_a_cold_one_less_than_six():
    assert 60 * doctor.MINUTES + doctor.MARGIN_S < 180 and LIMIT_S < 180
    assert 2 * 60 * doctor.MINUTES + doctor.MARGIN_S < 360


class JumpedClock:
    """The module ``time`` with a monotonic clock that is ``jumped_s`` seconds ahead."""

    jumped_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self.jumped_s


def warm_up(what: str) -> None:
    """Meet for checks of 400 seconds together, half for the first check, after a warm-up of 1000 seconds."""
    from megatron_selfdistill.instruments.selftest import meeting as module

    rank = int(os.environ["RANK"])
    module.time = clock = JumpedClock()

    def work(phase):
        phase("the first collective")
        phase("compiling")
        if what == "hangs":  # in real time: rank 0 must not be at its limit before rank 1 has published its phase
            return time.sleep(1000 * rank)
        clock.jumped_s += 1000.0
        if rank == 1 and what == "raises":
            raise OSError("no compiler")

    with Meeting(rank, 2, print_outcome, limit_s=400.0, grace_s=500.0) as meeting:
        meeting.hold("together", sound, leave=lambda: None)
        warm = meeting.warm_up(work, leave=lambda: None, limit_s=4.0 if what == "hangs" else 2000.0)
        print(warm.name, warm.error)
        print(meeting.hold("first", sound, leave=lambda: None, share=0.5).passed, meeting._share_s > 100.0)


def test_a_slow_warm_up_takes_nothing_of_the_first_checks_share(ranks):
    ended = ranks.run(in_a_fork, warm_up, "slow", world_size=2, init_process_group=False)
    assert ended == [(0, "warm-up \nTrue True\n")] * 2


def test_the_error_of_a_warm_up_is_reported_and_the_checks_follow(ranks):
    ended = ranks.run(in_a_fork, warm_up, "raises", world_size=2, init_process_group=False)
    assert ended == [(0, "warm-up rank 1: OSError: no compiler\nTrue True\n")] * 2


def test_a_rank_that_hangs_in_the_warm_up_is_named_with_its_phase(ranks):
    (first, output), (second, _) = ranks.run(in_a_fork, warm_up, "hangs", world_size=2, init_process_group=False)
    assert first == second == 1
    message = "rank 1 did not return from the warm-up within 4 s (--minutes gives them more); rank 1 is at compiling"
    assert output == f"warm-up | {message}\n", output


def selftest_that_never_begins() -> None:
    doctor.MARGIN_S = 0.0
    doctor.examine = lambda *_, **__: time.sleep(1000)
    doctor.main(["--selftest", "--minutes", "0.01"])


def test_a_self_test_whose_ranks_never_meet_ends_as_well(ranks):
    """One rank may hang in its imports."""
    [(status, output)] = ranks.run(in_a_fork, selftest_that_never_begins, world_size=1, init_process_group=False)
    assert status == 1
    assert "the self-test did not end within 1 s" in output, output
