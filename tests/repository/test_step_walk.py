# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A reader follows a step of the default recipe through few files, of which the step executes much."""

from __future__ import annotations

import sys

import pytest
import tiny_run

sys.path.append(str(tiny_run.REPOSITORY / "tools"))
import step_walk


@pytest.mark.full
def test_a_step_is_within_its_budgets_and_its_figures_are_about_the_same_files(ranks, data, tmp_path):
    arguments = tiny_run.overrides(data, tmp_path, f"num_steps={step_walk.NUM_STEPS}", "checkpoint.save_every=0")
    (walk,) = ranks.run(tiny_run.with_trainer, arguments, step_walk.walked, world_size=1)
    figures = walk.figures()
    assert step_walk.misses(figures, step_walk.budgets()) == [], walk.report()
    assert {"train.py", "loss/target.py"} & set(walk.entered) == {"loss/target.py"}, "the loop itself is not traced"
    assert 1000 < figures["executed"] < figures["lines"]


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        ({"density": 0.19}, "density of a step: 0.19 is worse than the budget of 0.2"),
        ({"lines": 11_501}, "lines of a step: 11,501 is worse than the budget of 11,500"),
        ({"density": 0.21, "lines": 11_499}, None),
    ],
)
def test_a_lower_density_and_more_lines_are_misses(worse, words):
    budgets = {"density": 0.2, "lines": 11_500}
    found = step_walk.misses(budgets | worse, budgets)
    assert [sentence.partition(" in tools")[0] for sentence in found] == ([] if words is None else [words])
