# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The memory figures of docs/tuning.md are those that a dry run prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.data.prompts import DEFAULT_TEACHER_TEMPLATE
from megatron_selfdistill.plan.dry_run import dry_run

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "tuning.md").read_text()
ROWS = re.findall(r"^\| (?:none|`([^`|]+=[^`|]+)`) \| ([0-9.]+) \| ([0-9.]+) \|$", PAGE, re.MULTILINE)


def figures(*overrides: str) -> tuple[dict[str, str], tuple[str, str]]:
    """Return the parts and the two sums of one GPU of `recipe=qwen3_8b`."""
    [memory] = dry_run(load(["recipe=qwen3_8b", *overrides])).memory
    parts = {name: f"{size:.1f}" for name, size in (memory.rollout | memory.training).items()}
    return parts, (f"{memory.training_peak:.1f}", f"{memory.rollout_peak:.1f}")


@pytest.mark.parametrize(("keys", "training", "sampling"), ROWS, ids=[keys or "none" for keys, _, _ in ROWS])
def test_a_row_of_the_memory_table_is_what_the_plan_says(keys, training, sampling):
    assert figures(*keys.split())[1] == (training, sampling)


def test_the_printed_plan_is_what_the_plan_says():
    parts, sums = figures()
    printed = dict(re.findall(r"^  ([a-zA-Z= ]+?) +([0-9.]+)$", PAGE, re.MULTILINE))
    assert printed == {
        **{name: size for name, size in parts.items() if size != "0.0"},
        "= while training": sums[0],
        "= while sampling": sums[1],
    }


def test_the_page_has_all_rows_and_the_length_of_the_default_wording():
    assert len(ROWS) == 10
    assert f"has {len(DEFAULT_TEACHER_TEMPLATE) - len('{problem}{solution}')} characters of its own" in PAGE
