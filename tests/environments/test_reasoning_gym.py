# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tasks of reasoning-gym as problems: records that the project reads, and verdicts on right and wrong responses."""

from __future__ import annotations

import pytest

from megatron_selfdistill.data.problems import load_problems
from megatron_selfdistill.data.records import RecordSource


@pytest.mark.parametrize("name", ["gsm_symbolic", "knights_knaves", "word_sorting"])
def test_the_problems_of_a_task_are_read_and_verified(tmp_path, name):
    import tiny_run  # noqa: F401  # puts the examples on the path
    from environments.reasoning_gym_tasks import verify, write_problems

    path = tmp_path / "problems.jsonl"
    write_problems(path, name, number=5, seed=3)
    problems = load_problems(
        RecordSource(path, "train", None, {}, "error", None, "data"), require_solution=True
    ).problems
    assert len(problems) == 5
    for problem in problems:
        assert verify(f"So.\n#### {problem.answer}", problem) and not verify("#### none of it", problem)
        if name == "gsm_symbolic":
            assert problem.solution.endswith(f"#### {problem.answer}")
