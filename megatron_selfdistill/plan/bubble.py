# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The order in which Megatron's schedules run the microbatches of a step, and how long the stages wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Times:
    """The times of one microbatch in one stage, in any unit."""

    forward: float = 1.0
    """The time of the student's forward pass."""
    backward: float = 2.0
    """The time of the student's backward pass."""
    teacher: float = 1.0
    """The time of the teacher's forward pass."""


@dataclass(frozen=True)
class Simulated:
    """The result of the simulation of one step."""

    time: float
    """The time from the first forward to the last backward, in the unit of `Times`."""
    bubble: float
    """The share of ``time`` in which a stage waits, as the mean over the stages."""
    in_flight: tuple[int, ...]
    """The largest number of student microbatches (of one chunk each) whose activations a stage holds, per stage."""


def order(num_student: int, num_teacher: int, pair_order: str, *, with_reference: bool = False) -> list[str]:
    """Return the roles of the microbatches of a step, in the order in which schedule.py gives them to Megatron.

    ``with_reference``: a reference reads each student microbatch; it takes the time of a teacher, and has its role.
    """
    references = [TEACHER] if with_reference else []
    if pair_order == "alternating" and num_teacher:
        return [TEACHER, *references, STUDENT] * num_student
    return [TEACHER] * num_teacher + references * num_student + [STUDENT] * num_student


def simulate(streams: Sequence[str], pp_size: int, num_chunks: int = 1, times: Times | None = None) -> Simulated:
    """Simulate 1F1B, or with ``num_chunks > 1`` the interleaved schedule, on ``pp_size`` stages; messages take no time.

    The interleaved schedule needs a multiple of ``pp_size`` microbatches, and each chunk takes 1 / ``num_chunks`` of
    `Times`.
    """
    times = times or Times()
    stages = [operations(len(streams), pp_size, stage, num_chunks) for stage in range(pp_size)]
    last_chunk = num_chunks - 1
    done: dict[tuple[int, str, int, int], float] = {}
    clock, position = [0.0] * pp_size, [0] * pp_size
    while any(at < len(ops) for at, ops in zip(position, stages, strict=True)):
        for stage, ops in enumerate(stages):
            while position[stage] < len(ops):
                kind, microbatch, chunk = ops[position[stage]]
                if kind == "F":
                    awaited = (
                        (stage - 1, kind, microbatch, chunk) if stage else (pp_size - 1, "F", microbatch, chunk - 1)
                    )
                    first = stage == 0 and chunk == 0
                else:
                    last = stage == pp_size - 1
                    awaited = (0, kind, microbatch, chunk + 1) if last else (stage + 1, kind, microbatch, chunk)
                    first = last and chunk == last_chunk  # its own forward precedes it in this stage
                if not first and awaited not in done:
                    break
                start = max(clock[stage], 0.0 if first else done[awaited])
                clock[stage] = start + _duration(streams[microbatch], kind, times) / num_chunks
                done[stage, kind, microbatch, chunk] = clock[stage]
                position[stage] += 1
    total = max(clock)
    busy = sum(_duration(stream, kind, times) for stream in streams for kind in "FB")
    return Simulated(total, 1 - busy / total, tuple(_most_in_flight(ops, streams) for ops in stages))


def operations(num_microbatches: int, pp_size: int, stage: int, num_chunks: int) -> list[tuple[str, int, int]]:
    """Return (F or B, microbatch, chunk) of one stage, in the order of Megatron Core's schedules."""
    total = num_microbatches * num_chunks
    warmup = pp_size - stage - 1
    if num_chunks > 1:
        warmup = 2 * warmup + (num_chunks - 1) * pp_size
    warmup = min(warmup, total)
    group = pp_size * num_chunks
    virtual = [((k // group) * pp_size + k % pp_size, k % group // pp_size) for k in range(total)]
    if num_chunks == 1:
        virtual = [(k, 0) for k in range(total)]
    forward = [("F", microbatch, chunk) for microbatch, chunk in virtual]
    backward = [("B", microbatch, num_chunks - 1 - chunk) for microbatch, chunk in virtual]
    steady = [op for pair in zip(forward[warmup:], backward[: total - warmup], strict=True) for op in pair]
    return forward[:warmup] + steady + backward[total - warmup :]


def _duration(stream: str, kind: str, times: Times) -> float:
    if stream == TEACHER:
        return times.teacher if kind == "F" else 0.0
    return times.forward if kind == "F" else times.backward


def _most_in_flight(ops: Sequence[tuple[str, int, int]], streams: Sequence[str]) -> int:
    held = most = 0
    for kind, microbatch, _ in ops:
        if streams[microbatch] == STUDENT:
            held += 1 if kind == "F" else -1
            most = max(most, held)
    return most
