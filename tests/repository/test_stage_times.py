# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""CI fails for a stage that has grown against the others, and not for a slow machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script

RECORDED = {"venv": 80.0, "make check": 50.0, "make test": 400.0, "make docs": 30.0, "make test-vllm": 700.0}
stage_times = load_script(Path(__file__).resolve().parents[2] / "tools" / "stage_times.py")


@pytest.mark.parametrize("pace", [0.5, 1.0, 3.0])
def test_only_a_stage_that_has_grown_against_the_others_fails(pace: float) -> None:
    stages = {name: pace * seconds for name, seconds in RECORDED.items() if name != "make test-vllm"}
    assert stage_times.expected_stages(stages, RECORDED)["make test-vllm"] == pytest.approx(pace * 700.0)
    assert stage_times.compare(stages, RECORDED) == []
    grown = stages["make docs"] + stage_times.SLACK_S - 1  # more than half, and yet only seconds
    assert stage_times.compare(stages | {"make docs": grown}, RECORDED) == []
    stages["make test"] *= 1.9
    (sentence,) = stage_times.compare(stages, RECORDED)
    words = f"{pace * 1.9:.2f} times its recorded seconds, and every other stage at most {pace:.2f} times"
    assert f"the stage 'make test' took {pace * 760:,.0f} s, {words}" in sentence
    stages["make check"] *= 1.3  # the machine was that slow for some minutes
    assert stage_times.compare(stages, RECORDED) == []
