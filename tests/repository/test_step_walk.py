# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A reader follows a step of the default recipe through few files, and hardly ever back into an earlier one."""

from __future__ import annotations

import re
import sys

import pytest
import tiny_run

sys.path.append(str(tiny_run.REPOSITORY / "tools"))
import step_walk

MOST_FILES, MOST_JUMPS, MOST_EMPTY = 40, 8, 0


@pytest.mark.full
def test_a_step_enters_few_files_and_hardly_jumps_back(ranks, data, tmp_path):
    arguments = tiny_run.overrides(data, tmp_path, f"num_steps={step_walk.NUM_STEPS}", "checkpoint.save_every=0")
    (report,) = ranks.run(tiny_run.with_trainer, arguments, step_walk.walked, world_size=1)
    numbers = re.search(r"(\d+) files, \d+ lines, (\d+) jumps back, (\d+) empty calls$", report)
    num_files, num_jumps, num_empty = map(int, numbers.groups())
    assert 0 < num_files <= MOST_FILES and num_jumps <= MOST_JUMPS and num_empty <= MOST_EMPTY, report
