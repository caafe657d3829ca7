# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Curves show the metrics that runs logged: the right points, smoothed as configured, in one picture."""

from __future__ import annotations

import json

import pytest

from _lib.curves import ENTROPY, GREEDY, Panel, curve, plot_curves


def write_run(directory, lines):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_curve_has_the_lines_that_hold_its_metric():
    lines = [{"step": 0, "a": 1.0}, {"step": 1, "b": 5.0}, {"step": 2, "a": 3.0}]
    assert curve(lines, Panel("a", "")) == ([0, 2], [1.0, 3.0])
    assert curve(lines, Panel("c", "")) == ([], [])


def test_smoothing_is_the_mean_up_to_each_step():
    lines = [{"step": step, "a": float(step)} for step in range(4)]
    assert curve(lines, Panel("a", "", smoothing=2))[1] == [0.0, 0.5, 1.5, 2.5]


def test_one_picture_shows_runs_that_differ_in_length_and_in_metrics(tmp_path):
    distilled = [{"step": step, ENTROPY.key: 0.1 / step} for step in range(1, 30)]
    distilled += [{"step": step, GREEDY.key: 0.3 + step / 50} for step in (0, 25)]
    baseline = [{"step": 0, GREEDY.key: 0.3}]
    runs = {"ours": write_run(tmp_path / "a", distilled), "fine-tuning": write_run(tmp_path / "b", baseline)}
    picture = plot_curves(runs, tmp_path / "new" / "curves.png", (GREEDY, ENTROPY), "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_text = plot_curves(runs, tmp_path / "curves.svg", (GREEDY, ENTROPY)).read_text()
    assert as_text.count("<!-- fine-tuning -->") == 1, "in the legend, though its entropy is not logged"


def test_runs_that_logged_nothing_of_it_are_an_error_that_names_the_metrics(tmp_path):
    run = write_run(tmp_path / "a", [{"step": 1, "loss/mean": 1.0}])
    with pytest.raises(ValueError, match="evaluation/greedy_accuracy"):
        plot_curves({"a": run}, tmp_path / "curves.png", (GREEDY,))
