# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A leaking hint: the anchor holds the leak."""

from __future__ import annotations

import dataclasses

import pytest

from _lib import leaking_subtraction, pretraining, subtraction
from _lib.watched_runs import WITHOUT_GUARDS, watch


@pytest.mark.full
def test_the_anchor_keeps_the_work_that_the_teacher_alone_drops(load_example, root):
    example = load_example("09_leaking_hint")
    few = dataclasses.replace(leaking_subtraction.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:150])
    base = pretraining.make_base(few, 5, root / "bases")
    problems = pretraining.write_records(root / "leaking.jsonl", leaking_subtraction.TASK.training_problems(5))
    work, sampled = {}, {}
    for variant in (example.TEACHER_ALONE, example.ANCHORED):
        unguarded = variant.on(problems, *WITHOUT_GUARDS)
        before, after = watch(unguarded, base, root / "leaking" / variant.title, (0, 100))
        work[variant], sampled[variant] = after.shows_work, after.sampled
    assert before.shows_work > 0.85
    assert work[example.TEACHER_ALONE] < 0.6 < 0.8 < work[example.ANCHORED]
    assert sampled[example.ANCHORED] > sampled[example.TEACHER_ALONE] + 0.2
