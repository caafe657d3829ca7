# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes side by side: the page shows the tables of its lines, and every cell runs once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tool(tools: Callable[[str], ModuleType]) -> ModuleType:
    return tools("recipe_table")


def test_the_page_shows_the_tables_of_the_lines(tool):
    assert tool.main(["--check"]) == 0, "run python tools/benchmarks/recipe_table.py --tables"


def test_every_line_is_the_only_one_of_its_cell_and_has_the_overrides_of_its_row(tool):
    lines = tool.read_lines(tool.LINES)
    cells = [(line["block"], line["row"], line["seed"], tool.rate_of(line)) for line in lines]
    assert len(set(cells)) == len(cells)
    for line in lines:
        assert line["seed"] in tool.SEEDS and line["row"] in tool.rows_of_block(line["block"])
        if line["row"] != tool.BEFORE:
            block = tool.example.BLOCKS[line["block"]]
            settings = tool.settings_of(tool.rate_of(line))
            assert line["overrides"] == [*tool.example.overrides_of(line["row"], block), *settings], line
            assert line["step"][-1] == tool.example.NUM_STEPS


def test_a_table_for_every_block_stands_in_the_page(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    for block in tool.example.BLOCKS:
        assert f"<!-- table {block} -->" in page and f"<!-- table {block}_budget -->" in page


def test_cells_whose_line_is_there_are_not_run_again(tool, monkeypatch, tmp_path):
    lines, run = tmp_path / "lines.jsonl", []
    lines.write_text('{"block": "additions", "row": "grpo", "seed": 21}\n')
    monkeypatch.setattr(tool, "run_cell", lambda block, row, seed, *_: run.append((block, row, seed)))
    asked = ["--blocks", "additions", "--rows", "before", "grpo", "caopd", "--seeds", "21", "22"]
    assert tool.main([*asked, f"--lines={lines}"]) == 0
    assert run == [("additions", "before", 21), ("additions", "before", 22), ("additions", "grpo", 22)]


def test_learning_rates_run_the_rows_that_are_compared_at_the_rates_that_are_missing(tool, monkeypatch, tmp_path):
    lines, run = tmp_path / "lines.jsonl", []
    lines.write_text('{"block": "additions", "row": "grpo", "seed": 21, "lr": 0.001}\n')
    monkeypatch.setattr(tool, "run_cell", lambda *cell: run.append(cell[:4]))
    asked = ["--blocks", "additions", "--rows", "before", "opsd", "grpo", "--seeds", "21", "--learning-rates"]
    assert tool.main([*asked, f"--lines={lines}"]) == 0
    assert run == [("additions", "grpo", 21, 1e-4)]
    assert tool.settings_of(1e-4) == ("optimizer.lr=0.0001",) and tool.settings_of(tool.RATE) == ()


def test_a_block_runs_its_own_rows_alone(tool, monkeypatch, tmp_path):
    run = []
    monkeypatch.setattr(tool, "run_cell", lambda block, row, seed, *_: run.append((block, row)))
    asked = ["--rows", "before", "sod", "rft", "--seeds", "21", "--blocks", "calculator", "unsolved"]
    assert tool.main([*asked, f"--lines={tmp_path}/lines.jsonl"]) == 0
    expected = [("calculator", "before"), ("calculator", "sod"), ("unsolved", "before"), ("unsolved", "rft")]
    assert run == expected


def test_a_cell_appends_its_line_and_removes_its_run(tool, monkeypatch, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"block": "additions"}\n')

    def measured(name: str, row: str, seed: int, settings: tuple[str, ...], root: Path) -> dict:
        assert settings == tool.settings_of(1e-4)
        (root / f"{name}-seed{seed}").mkdir(parents=True)
        return {"overrides": ["recipe=grpo"], "greedy": 0.123456, "sampled_by_step": [0.25, 0.56789], "with_hint": None}

    monkeypatch.setattr(tool, "cell", measured)
    tool.run_cell("unsolved", "grpo", 21, 1e-4, lines, tmp_path / "runs")
    first, line = tool.read_lines(lines)
    assert first == {"block": "additions"}
    about = {"block": "unsolved", "row": "grpo", "seed": 21, "lr": 1e-4, "overrides": ["recipe=grpo"]}
    assert line == about | {"greedy": 0.1235, "sampled_by_step": [0.25, 0.5679], "with_hint": None}
    assert not (tmp_path / "runs" / "unsolved-seed21").exists()


def lines_of_block(tool: ModuleType, seed: int, sampled: float) -> list[dict]:
    """Return a line for every row of the block additions, all with the same figures."""
    figures = dict.fromkeys((*tool.example.RESULTS, *tool.example.BUDGET), 0.5) | {
        "sampled": sampled,
        "with_hint": None,
    }
    figures |= {"tokens": 70000 + 10 * seed, "cpu_seconds": 8.8}
    return [{"block": "additions", "row": row, "seed": seed, **figures} for row in tool.rows_of_block("additions")]


def test_a_table_has_the_mean_and_the_extremes_of_the_seeds_that_have_all_rows(tool):
    lines = lines_of_block(tool, 21, 0.2) + lines_of_block(tool, 22, 0.4) + lines_of_block(tool, 23, 1.0)[:-1]
    heading, _, before, *rows = tool.results_table("additions", lines)
    assert heading.startswith("| step 100, seeds 21, 22 | greedy | sampled | pass@8 | different | entropy |")
    assert before.startswith("| before | .50 [.50 .50] | .30 [.20 .40] |") and len(rows) == len(tool.example.COMMON)
    heading, _, *rows = tool.budget_table("additions", lines)
    assert heading == "| seeds 21, 22 | teacher sees | responses per step | trained | with hint | tokens | seconds |"
    assert rows[0] == "| default | the solution | 32 x 1 | .50 [.50 .50] |  | 70215 | 9 |"
    assert tool.results_table("unsolved", lines) == ["No seed has a line for every row yet."]


def test_the_table_of_rates_has_the_seeds_with_every_cell_and_a_column_for_each_rate(tool):
    lines = [
        {
            "block": "additions",
            "row": row,
            "seed": seed,
            "sampled": rate * 100,
            **({} if rate == tool.RATE else {"lr": rate}),
        }
        for seed in (21, 22)
        for row in tool.RATED
        for rate in tool.RATES
    ]
    heading, _, *rows = tool.rates_table("additions", lines[:-1])
    assert heading == "| sampled at step 100, seed 21 | 1e-04 | 3e-04 | 1e-03 |"
    assert rows[0] == "| default | .010 | .030 | .10 |" and len(rows) == len(tool.RATED)
    assert tool.rates_table("additions", lines[1:18]) == ["No seed has a line for every cell yet."]
