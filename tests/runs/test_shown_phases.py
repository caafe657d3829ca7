# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run shows its phases and its finished responses, from the step at which it starts or resumes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import tiny_run
from tiny_run import overrides

from megatron_selfdistill.metrics import phases


def start_and_show_everything(arguments: Sequence[str]) -> tuple[int, str]:
    """Return the status and the output of a run in which every phase is slow and looked at all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "LINE_SECONDS", 0.0)
        patch.setattr(phases, "_TICK_SECONDS", 1e-4)
        return tiny_run.start_and_listen(arguments)


def test_a_run_shows_its_phases_and_finished_responses_from_the_step_where_it_resumes(ranks, data, tmp_path):
    more = ("checkpoint.save_every=0", "rollout.num_samples=3", "metrics.console_every=1")
    for step, world_size, whose in ((1, 2, "12 responses of this replica"), (2, 1, "24 responses")):
        arguments = overrides(data, tmp_path / "run", f"num_steps={step}", *more)
        per_rank = ranks.run(
            start_and_show_everything, arguments, world_size=world_size, timeout=60, init_process_group=False
        )
        assert [status for status, _ in per_rank] == [0] * world_size
        text, *of_others = (text for _, text in per_rank)
        counts = re.findall(rf"^step {step}: rollout, (\d+) of {whose}, 0:\d\d$", text, re.MULTILINE)
        assert counts == sorted(counts, key=int) and len(set(counts)) > 1
        assert re.search(rf"^step {step}: train, microbatch \d+ of \d+, 0", text, re.MULTILINE)
        assert re.search(rf"^after step {step}: checkpoint, 0", text, re.MULTILINE)
        assert step == 1 or "step 1: " not in text
        assert not any("rollout, " in text for text in of_others)
