# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The simulated schedules take as long as the theory says, and hold as many activations."""

from __future__ import annotations

import pytest

from megatron_selfdistill.plan.bubble import Times, operations, order, simulate

# Stages, pairs, time of alternating and of teacher_first, from another simulator of Megatron's order.
KNOWN = [(4, 8, 55, 41), (4, 128, 775, 521), (8, 8, 67, 53), (8, 64, 403, 277), (16, 16, 139, 109), (16, 128, 811, 557)]


@pytest.mark.parametrize(("pp_size", "pairs", "alternating", "teacher_first"), KNOWN)
def test_both_orders_take_the_known_times(pp_size, pairs, alternating, teacher_first):
    assert simulate(order(pairs, pairs, "alternating"), pp_size).time == alternating
    assert simulate(order(pairs, pairs, "teacher_first"), pp_size).time == teacher_first


@pytest.mark.parametrize("times", [Times(), Times(backward=3.0), Times(teacher=2.0), Times(forward=0.5, teacher=0.25)])
@pytest.mark.parametrize(("pp_size", "students", "teachers"), [(1, 3, 3), (2, 5, 9), (4, 16, 7), (8, 8, 20)])
def test_teacher_first_waits_for_one_fill_and_one_drain(pp_size, students, teachers, times):
    ideal = students * (times.forward + times.backward) + teachers * times.teacher
    waits = (pp_size - 1) * (max(times.forward, times.teacher) + times.backward)
    simulated = simulate(order(students, teachers, "teacher_first"), pp_size, times=times)
    assert simulated.time == pytest.approx(ideal + waits)
    assert simulated.bubble == pytest.approx(waits / (ideal + waits))


@pytest.mark.parametrize(("pp_size", "num_chunks"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_interleaving_divides_the_wait_by_the_number_of_chunks(pp_size, num_chunks):
    simulated = simulate(order(2 * pp_size, 2 * pp_size, "teacher_first"), pp_size, num_chunks)
    assert simulated.time == pytest.approx(2 * pp_size * 4 + (pp_size - 1) * 3 / num_chunks)


def test_one_stage_never_waits():
    assert simulate(order(5, 5, "alternating"), 1).bubble == 0


def test_an_earlier_stage_holds_one_more_microbatch_than_the_next():
    assert simulate(order(16, 16, "teacher_first"), 4).in_flight == (4, 3, 2, 1)
    assert simulate(order(2, 2, "teacher_first"), 4).in_flight == (2, 2, 2, 1), "no more than there are"


def test_half_of_what_alternating_holds_are_teachers_which_hold_nothing():
    assert simulate(order(16, 16, "alternating"), 4).in_flight == (2, 2, 1, 1)


def test_the_interleaved_schedule_holds_what_its_longer_warm_up_forwarded():
    assert simulate(order(16, 16, "teacher_first"), 4, 2).in_flight == (11, 9, 7, 5)


@pytest.mark.parametrize(("pp_size", "num_chunks", "count"), [(4, 1, 6), (4, 1, 2), (2, 2, 6), (4, 3, 8)])
def test_each_stage_runs_every_microbatch_of_every_chunk_once_each_way(pp_size, num_chunks, count):
    for stage in range(pp_size):
        ops = operations(count, pp_size, stage, num_chunks)
        expected = {(kind, m, c) for kind in "FB" for m in range(count) for c in range(num_chunks)}
        assert len(ops) == len(expected) and set(ops) == expected
        for m in range(count):
            for c in range(num_chunks):
                assert ops.index(("F", m, c)) < ops.index(("B", m, c))


@pytest.mark.parametrize(("pp_size", "num_chunks"), [(4, 1), (4, 2), (2, 3)])
def test_the_order_is_that_of_megatrons_own_tables(pp_size, num_chunks):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(2 * pp_size, num_chunks, pp_size)
    forwards = [(m, c) for kind, m, c in operations(2 * pp_size, pp_size, 0, num_chunks) if kind == "F"]
    assert forwards == [tuple(item) for item in table]
