# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""JSON files of evaluations that are equal except for the rounding of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def read_lines(path: Path) -> list[Any]:
    """Return the JSON values of a file: one per line for .jsonl, else one."""
    text = path.read_text()
    return [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def assert_equal_but_for_rounding(found: Any, expected: Any, relative: float = 1e-4) -> None:
    """Compare JSON values; the log-probs of the tokens, from which a confidence comes, round with layout and engine."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
    if isinstance(found, float):
        assert found == pytest.approx(expected, rel=relative, abs=1e-9)
    elif isinstance(found, dict | list):
        for key in found if isinstance(found, dict) else range(len(expected)):
            assert_equal_but_for_rounding(found[key], expected[key], relative)
        assert len(found) == len(expected)
    else:
        assert found == expected
