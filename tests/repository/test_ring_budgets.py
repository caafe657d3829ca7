# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines of a ring and the number of files are counted, and an excess of one line fails."""

from __future__ import annotations

import sys

import pytest
from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import ring_budgets

FILES = {"train.py": 3, "methods.py": 2, "config/schema.py": 4, "methods/sod.py": 5, "interop/hf/a.py": 6}
BUDGETS = {"files": 5, "lines": {"core": 9, "methods": 5, "interop": 6, "instruments": 0}}


@pytest.fixture
def package(tmp_path):
    for name, lines in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# a line\n" * lines)
    (tmp_path / "interop" / "names.yaml").write_text("no: Python\n")
    return tmp_path


def test_a_package_within_its_budgets_passes_with_every_ring_printed(package, capsys):
    assert ring_budgets.exceeded(package, BUDGETS) == []
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and printed[0].split() == ["lines", "of", "core", "9", "of", "9"]


@pytest.mark.parametrize("ring", ["core", "methods", "interop"])
def test_one_line_above_the_budget_of_a_ring_fails(package, ring):
    budgets = {**BUDGETS, "lines": {**BUDGETS["lines"], ring: BUDGETS["lines"][ring] - 1}}
    (sentence,) = ring_budgets.exceeded(package, budgets)
    assert sentence.startswith(f"lines of {ring}: ")


def test_one_file_too_many_fails(package):
    (sentence,) = ring_budgets.exceeded(package, {**BUDGETS, "files": 4})
    assert sentence.startswith("Python files: 5 are above the budget of 4")


def test_the_package_is_within_its_budgets():
    assert ring_budgets.main() == 0
