# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page of ``make bench-gpu``: what the scripts print, with hardware and commit, and never figures without them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
WHERE = {"device": "1 x H200", "versions": "torch 2.11", "date": "2026-01-02", "commit": "abc1234"}


@pytest.fixture(scope="module")
def tool():
    return load_script(REPOSITORY / "tools" / "benchmarks" / "on_gpu.py")


def test_the_page_says_that_nothing_was_measured_until_a_gpu_has_run_it(tool):
    text = tool.PAGE.read_text()
    if tool.NOTHING_YET in text:
        assert text == tool.page([], None)
    else:
        assert ", commit " in text and "CPU" not in text.split("##")[0].split("logits at the speed")[1]


def test_a_script_that_fails_is_a_line_and_the_others_are_measured(tool, tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("print('noise')\nprint('sizes')\nprint('| | ms |\\n|---|---|\\n| ours | 3 |')")
    bad.write_text("print('| half | a table |')\nraise SystemExit(3)")
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(600)")
    found = [
        tool.measured(tool.Measurement(path.stem, str(path), [], 60.0), limit)
        for path, limit in ((good, 60.0), (bad, 60.0), (slow, 1.0))
    ]
    page = tool.page(found, WHERE)
    assert "1 x H200; torch 2.11; 2026-01-02, commit abc1234." in page
    assert "sizes\n\n| | ms |\n|---|---|\n| ours | 3 |\n" in page and "noise" not in page
    assert "This measurement failed: the stage ended with status 3." in page
    assert "This measurement failed: the stage was killed at its limit of 1 s." in page


def test_one_gpu_takes_nine_minutes_at_most_and_measures_every_size(tool):
    found = tool.measurements(on_gpu=True, gpus=1)
    assert sum(one.limit_s for one in found) <= 540
    losses = [one for one in found if one.script == "tools/benchmarks/loss_time.py"]
    sizes = {(one.arguments[1], *one.arguments[3:5], "--hidden" in one.arguments) for one in losses}
    assert sizes == {(n, "151936", "18992", hidden) for n in ("16384", "4096") for hidden in (False, True)}
    assert len(tool.measurements(on_gpu=True, gpus=8)) == len(found) + 1


def test_without_a_gpu_it_says_so_and_writes_nothing(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool.hidden_gpus, "number", lambda visible: 0)
    before = tool.PAGE.read_text()
    assert tool.main([]) == 1 and tool.PAGE.read_text() == before
    assert "on a CPU use --device cpu" in capsys.readouterr().err


def test_tables_keep_the_line_of_text_above_each(tool):
    lines = ["start", "first", "", "| a |", "|---|", "| 1 |", "", "second", "", "| b |", "|---|", "", "end"]
    expected = ["first", "", "| a |", "|---|", "| 1 |", "", "second", "", "| b |", "|---|"]
    assert tool.tables(lines)[: len(expected)] == expected
    assert "tests.gpu" in sys.modules, "the runner of the stages is shared with make test-gpu"
