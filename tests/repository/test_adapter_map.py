# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measurement of adapters: the page shows the tables of its lines, and every cell runs once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tool(tools: Callable[[str], ModuleType]) -> ModuleType:
    return tools("adapter_map")


def test_the_page_shows_the_tables_of_the_lines(tool):
    assert tool.main(["--check"]) == 0, "run python tools/benchmarks/adapter_map.py --tables"


def test_every_line_is_the_only_one_of_its_cell_and_has_the_overrides_of_its_arm(tool):
    lines = tool.read_lines(tool.LINES)
    cells = [(line["task"], line["arm"], line["rate"], line["seed"]) for line in lines]
    assert len(set(cells)) == len(cells) > 0
    for line in lines:
        task = tool.TASKS[line["task"]]
        if line["arm"] == tool.BEFORE:
            assert line["step"] == [0]
        else:
            assert line["overrides"] == [*tool.overrides_of(line["arm"], line["rate"]), *task.settings], line
            assert line["step"] == list(task.steps)


def test_the_overrides_of_an_arm_are_its_rank_and_a_multiple_of_the_rate_of_the_examples(tool):
    assert tool.overrides_of("rank_4", 10) == ("adapter.rank=4", "optimizer.lr=0.003")
    assert tool.overrides_of(tool.ALL, 1) == ("optimizer.lr=0.0003",) and tool.overrides_of(tool.BEFORE, 1) == ()


def test_cells_whose_line_is_there_are_not_run_again(tool, monkeypatch, tmp_path):
    lines, run = tmp_path / "lines.jsonl", []
    monkeypatch.setattr(tool, "run_cell", lambda *cell: run.append(cell[:4]))
    lines.write_text(json.dumps({"task": "hard", "arm": "rank_4", "rate": 10, "seed": 11}) + "\n")
    asked = ["--tasks", "hard", f"--lines={lines}"]
    assert tool.main([*asked, "--seeds", "11", "--arms", "before", "rank_4", "rank_16"]) == 0
    assert run == [("hard", "before", 1, 11), ("hard", "rank_16", 10, 11)]
    run.clear()
    assert tool.main([*asked, "--seeds", "11", "--compare-rates", "10", "30"]) == 0
    assert run == [("hard", *cell, 11) for cell in tool.cells_of_rates([10, 30]) if cell != ("rank_4", 10)]


def test_a_cell_appends_its_line_and_removes_its_run(tool, monkeypatch, tmp_path):
    seen = []

    def measured(cell, root: Path, directory: Path) -> dict:
        seen.append((cell.arm, cell.seed, dict(cell.experiment.arms)))
        directory.mkdir(parents=True)
        return {"sampled": [0.5]}

    monkeypatch.setattr(tool.Cell, "run", measured)
    lines = tmp_path / "lines.jsonl"
    tool.run_cell("leak", "rank_16", 10, 11, lines, tmp_path / "runs")
    (line,) = tool.read_lines(lines)
    about = {"task": "leak", "arm": "rank_16", "rate": 10, "seed": 11, "sampled": [0.5]}
    assert about.items() <= line.items() and line["seconds"] >= 0 and line["cpu_seconds"] >= 0
    assert seen == [("rank_16", 11, {"rank_16": tool.overrides_of("rank_16", 10)})]
    assert not (tmp_path / "runs" / "leak" / "rank_16_x10-seed11").exists()
    tool.run_cell("leak", tool.BEFORE, 1, 11, lines, tmp_path / "runs")
    assert seen[1][0] == "base", "the anchored map's name of the base"


def lines_of(tool: ModuleType, cells: list[tuple[str, int]], seed: int, value: float) -> list[dict]:
    figures = {figure: [0.0, value] for figure in tool.FIGURES}
    return [{"task": "hard", "arm": arm, "rate": rate, "seed": seed, **figures} for arm, rate in cells]


def test_a_table_has_the_mean_and_the_extremes_of_the_reported_seeds_that_have_all_arms(tool):
    cells = list(tool.CHOSEN["hard"].items())
    lines = lines_of(tool, cells, 11, 0.2) + lines_of(tool, cells, 12, 0.4) + lines_of(tool, cells, 13, 1.0)[:-1]
    heading, _, before, whole, *adapted = tool.results_table("hard", lines + lines_of(tool, cells, 1, 0.9))
    assert heading == "| step 100, seeds 11, 12 | learning rate | greedy | sampled | work | entropy |"
    assert before.startswith("| before |  | .30 [.20 .40] |")
    assert whole.startswith("| all weights | 3e-04 | .30 [.20 .40] |")
    assert [row[:20] for row in adapted] == ["| rank 4 | 3e-03 | .", "| rank 16 | 3e-03 | "]
    assert tool.results_table("leak", lines) == ["No seed has a line for every row yet."]


def test_a_table_of_rates_has_a_column_for_each_rate_and_the_seeds_of_the_choice(tool):
    lines = [line for arm, rate in tool.cells_of_rates() for line in lines_of(tool, [(arm, rate)], 1, rate / 100)]
    heading, _, *rows = tool.rates_table("hard", lines)
    assert heading == "| sampled at steps 25 / 100, seed 1 | 3e-04 | 9e-04 | 3e-03 | 9e-03 |"
    assert rows[0] == "| all weights | .00 / .010 | .00 / .030 | .00 / .10 | .00 / .30 |" and len(rows) == 3
    assert tool.rates_table("hard", lines[1:]) == ["No seed has a line for every cell yet."]
