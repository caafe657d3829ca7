# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts of experiments/ start, and the tables of the pages are those of the recorded results."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = REPOSITORY / "experiments"
SCRIPTS = [path.name for path in sorted(EXPERIMENTS.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
PAGES = {
    "adapter_map.py": "adapters.md",
    "anchored_tables.py": "anchored.md",
    "false_alarms.py": "report.md",
    "hint_levels.py": "evaluation.md",
    "quests.py": "environments.md",
    "real_map.py": "real_model.md",
    "recipe_table.py": "recipes/comparison.md",
    "staleness.py": "benchmarks.md",
    "two_teachers.py": "teachers.md",
}
"""Script -> the page whose tables it writes from a file of experiments/results/."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], tuple[int, str]]:
    """Return a function that runs a script with one option as the main module; it gives the status and the output.

    The script runs in this process, because a process of its own would import torch and Megatron Core for seconds.
    """

    def run(script: str, option: str) -> tuple[int, str]:
        path = EXPERIMENTS / script
        monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
        monkeypatch.setattr(sys, "argv", [str(path), option])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        output, error = capsys.readouterr()
        return int(end.value.code or 0), output + error

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_experiment_starts(script, run):
    status, output = run(script, "--help")
    assert status == 0 and output.startswith(f"usage: {script} "), output


@pytest.fixture(scope="module")
def recipe_table() -> Iterator[ModuleType]:
    """Yield the module of recipe_table.py, which imports the example's rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXPERIMENTS), str(REPOSITORY / "examples"), *sys.path])
        yield importlib.import_module("recipe_table")


def line(row: str, seed: int, sampled: float, **more: object) -> dict[str, object]:
    return {"block": "subtraction", "row": row, "seed": seed, "sampled": sampled, "sampled_at_half": 0.5, **more}


def validated(row: str, *sampled: float) -> list[dict[str, object]]:
    """Return lines of validation with the sampled accuracy at 1e-4, 3e-4 and 1e-3."""
    rates = ({"lr": 1e-4}, {}, {"lr": 1e-3})
    return [line(row, 20, x, split="validation", **rate) for x, rate in zip(sampled, rates, strict=False)]


def on_held_out(row: str, sampled: float, **more: object) -> list[dict[str, object]]:
    return [line(row, seed, sampled, **more) for seed in (21, 22, 23)]


@pytest.mark.parametrize("block", ["subtraction", "additions", "unsolved"])
def test_validation_shares_no_problem_with_training_or_with_the_held_out_problems(recipe_table, block):
    task = recipe_table.example.BLOCKS[block].task
    records = task.training_problems(20)
    train, held_out = recipe_table.divided(records)
    texts = [{record["problem"] for record in some} for some in (train, held_out, task.held_out_problems())]
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]
    assert len(held_out) == len(texts[1]) <= recipe_table.NUM_VALIDATION and held_out
    assert 0.7 < len(train) / len(records) < 0.9 and all(record in records for record in held_out)


def test_the_best_rate_on_validation_is_chosen_and_the_test_split_has_no_say(recipe_table):
    lines = [*validated("opsd", 0.2, 0.4, 0.3), *on_held_out("opsd", 0.9, lr=1e-4), *validated("sft", 0.5, 0.5, 0.5)]
    assert recipe_table.chosen_rate("subtraction", "opsd", lines) == 3e-4
    assert recipe_table.chosen_rate("subtraction", "sft", lines) == 1e-4, "of equal rates the smallest"
    assert recipe_table.chosen_rate("subtraction", "opsd", validated("opsd", 0.2, 0.4)) is None, "a rate is missing"
    assert recipe_table.chosen_rate("additions", "opsd", lines) is None
    missing = recipe_table.Cell("subtraction", "opsd", 21, 3e-4)
    assert recipe_table.asked_rates(missing, lines, False) == (3e-4,) and not any(map(missing.is_of, lines))


def test_a_tuned_row_shows_its_chosen_rate_and_any_other_row_says_that_it_is_not_tuned(recipe_table):
    lines = [*validated("opsd", 0.1, 0.2, 0.3), *on_held_out("opsd", 0.25), *on_held_out("opsd", 0.75, lr=1e-3)]
    lines += [*validated("sft", 0.3, 0.2, 0.1), *on_held_out("sft", 0.125), line("sft", 21, 0.875, lr=1e-4)]
    lines += [*on_held_out("default", 0.5), *on_held_out("grpo", 0.5, split="validation")]
    table = {
        cells[1]: cells[4:6]
        for cells in (
            [cell.strip() for cell in row.split("|")]
            for row in recipe_table.results_table({"subtraction": ("sampled",)}, lines)
        )
    }
    assert table["OPSD"] == ["1e-03", ".75 [.75 .75]"]
    assert table["SFT"] == ["recipe's own rate", ".12 [.12 .12]"], "not every seed has run at the chosen rate"
    assert table["default"] == ["recipe's own rate", ".50 [.50 .50]"] and table["GRPO"] == ["recipe's own rate", ""]


def test_worked_solutions_are_whole_right_responses(recipe_table, tmp_path):
    row_records = importlib.import_module("_lib.row_records")
    subtraction = importlib.import_module("_lib.subtraction")
    problems = tmp_path / "train.jsonl"
    records = subtraction.training_problems(21)[:50]
    problems.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    worked = [json.loads(text) for text in row_records.worked_problems(problems, tmp_path).read_text().splitlines()]
    for one, record in zip(worked, records, strict=True):
        assert one | {"solution": record["solution"]} == record
        assert subtraction.verify(one["solution"], SimpleNamespace(answer=record["answer"]))
        assert subtraction.shows_work(one["solution"]) and "$" not in one["solution"]


@pytest.mark.parametrize("script", PAGES)
def test_the_tables_of_a_page_are_those_of_the_recorded_results(script, run):
    page = (REPOSITORY / "docs" / PAGES[script]).read_text(encoding="utf-8")
    assert re.findall(r"^<!-- table (\w+) -->$", page, re.MULTILINE)
    status, output = run(script, "--check")
    assert status == 0, output or f"the tables of docs/{PAGES[script]} differ from the recorded results"
