# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a report holds: curves, guards, events and responses of run directories, also of damaged and private ones."""

from __future__ import annotations

import itertools
import json
import math
import random
import re

import pytest
from reported_runs import NASTY, blocks_of, write_run

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.html_page import html_page
from megatron_selfdistill.instruments.report import run_report
from megatron_selfdistill.instruments.report.run_record import limits, read_runs, step_shares
from megatron_selfdistill.instruments.report.run_report import curve_of, report_page, write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def page_of(*run_dirs):
    return report_page(read_runs(run_dirs))


def curve(blocks, key, run=0):
    differences, values, _, _ = blocks["curves"][key][run]
    steps = [sum(differences[: i + 1]) for i in range(len(differences))]
    return dict(zip(steps, values, strict=True))


def test_the_curves_are_those_of_the_log(run):
    blocks = blocks_of(page_of(run))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss/mean", "evaluation/greedy_accuracy"):
        assert curve(blocks, key) == {
            line["step"]: pytest.approx(line[key], rel=1e-4) for line in logged if key in line
        }


def test_the_keys_that_differ_come_first_and_the_equal_ones_not_at_all(run, tmp_path):
    other = write_run(tmp_path / "second", 30, "optimizer.lr=1e-3", "seed=4", shift=1.0)
    blocks = blocks_of(page_of(run, other))
    first, _, last = blocks["overview"]["differences"]
    assert first["columns"] == ["first", "second"]
    assert first["rows"] == [["optimizer.lr", "1e-06", "0.001"], ["seed", "0", "4"]]
    loss = next(row for row in last["rows"] if row[0].startswith("loss"))
    assert float(loss[2]) - float(loss[1]) == pytest.approx(1.0, abs=1e-3)
    assert curve(blocks, "loss/mean", 1)[7] - curve(blocks, "loss/mean", 0)[7] == pytest.approx(1.0, abs=1e-3)


def test_the_limits_of_the_guards_follow_from_the_first_steps(run):
    (record,) = read_runs([run])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean = sum(line["entropy/student"] for line in logged if line["step"] in range(1, 6) and "loss/mean" in line) / 5
    assert limits(record, "entropy/student") == {
        "guards.entropy.min_ratio": pytest.approx(0.02 * mean),
        "guards.entropy.max_ratio": pytest.approx(3 * mean),
    }
    assert list(limits(record, "response/length_mean")) == ["guards.min_length_ratio"]
    assert limits(record, "loss/mean") == {}
    shares = {"rollout": 1.2, "train": 0.5, "optimizer": 0.1, "other": 0.2}
    assert step_shares(record) == {phase: pytest.approx(seconds) for phase, seconds in shares.items()}


def test_a_figure_knows_which_runs_are_sick_by_it_numbers_that_are_not_finite_are_gaps_and_tiny_entropies_may_rise(
    run, tmp_path
):
    changes = {(step, "entropy/student"): 0.001 if step < 14 else 9.0 for step in range(1, 31)}
    changes |= {(4, "loss/mean"): math.nan, (5, "loss/mean"): math.inf}
    other = write_run(tmp_path / "second", changes=changes)
    blocks = blocks_of(page_of(run, other))
    assert [run["sick"] for run in blocks["overview"]["runs"]] == [[], ["Entropy"]]
    shown = curve(blocks, "loss/mean", 1)
    assert shown[4] is None and shown[5] is None and shown[6] is not None
    assert limits(read_runs([other])[0], "entropy/student")["guards.entropy.max_ratio"] == pytest.approx(0.051)


def test_the_log_of_another_trainer_has_a_report_with_the_names_of_this_project(tmp_path):
    steps = [{"loss": 1 / step, "grad_norm": 2.0, "completions/mean_length": 30, "step": step} for step in range(1, 9)]
    end = {"train_runtime": 8.2, "step": 8}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*steps, end], "max_steps": 8}))
    blocks = blocks_of(write_report([tmp_path]).read_text())
    assert curve(blocks, "loss/mean") == {step: pytest.approx(1 / step, rel=1e-4) for step in range(1, 9)}
    assert set(curve(blocks, "gradient_norm").values()) == {2.0}
    assert set(curve(blocks, "response/length_mean").values()) == {30.0}
    (shown,) = blocks["overview"]["runs"]
    assert shown["status"] == "8 steps"


def test_responses_are_blocks_and_never_markup_and_the_page_has_the_licence_of_its_library(run):
    page = page_of(run)
    assert "The MIT License (MIT)" in page and "Copyright (c) 2022 Leon Sorokin" in page
    assert NASTY not in page and "<img" not in page
    blocks = blocks_of(page)
    assert blocks["evaluations"][0][0]["response"] == f"{NASTY} 0"
    assert blocks["samples"][0][0]["tokens"][0] == [NASTY, -2.5, 0.1, 1.5, "matched"]
    assert blocks["samples"][0][0]["tokens"][3][1] is None  # the student's log-prob is no number


CHATS = ("data.kind=conversations",)


@pytest.mark.parametrize(("overrides", "shown"), [(CHATS, False), ((*CHATS, "conversations.show_contents=true"), True)])
def test_texts_of_chat_logs_need_show_contents_whatever_the_files_hold(tmp_path, overrides, shown):
    blocks = blocks_of(page_of(write_run(tmp_path / "chats", 30, *overrides, text="a private word")))
    assert ("private" in json.dumps(blocks)) is shown
    assert ("evaluations" in blocks, "samples" in blocks) == (shown, shown)


def test_directories_that_are_no_runs_are_refused(run, tmp_path):
    for run_dirs, words in (([run, tmp_path], r"neither metrics\.jsonl nor"), ([run, run], "twice")):
        with pytest.raises(ConfigError, match=words):
            read_runs(run_dirs)


@pytest.mark.parametrize("length", [1201, 10_000])
def test_a_long_curve_keeps_a_spike_of_one_step_in_both_directions_and_its_ends_and_a_short_one_every_value(length):
    assert curve_of([1, 2, 5], [0.1234567, -3.0, math.nan]) == [[1, 1, 3], [0.12346, -3.0, None], [], []]
    rng = random.Random(length)
    values = [rng.uniform(0.4, 0.6) for _ in range(length)]
    values[length // 3], values[length // 2] = 77.0, -77.0
    differences, shown, _, _ = curve_of(list(range(10, 10 + length)), values)
    kept = list(itertools.accumulate(differences))
    assert len(kept) <= 1204 and kept == sorted(set(kept))
    at = dict(zip(kept, shown, strict=True))
    assert at[10 + length // 3] == 77.0 and at[10 + length // 2] == -77.0
    assert (kept[0], kept[-1]) == (10, 9 + length)
    assert all(value == pytest.approx(values[step - 10], rel=1e-4) for step, value in at.items())


def test_values_that_are_not_finite_stay_as_gaps_and_do_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(run_report, "MAX_POINTS", 20)
    values = [1.0] * 4000
    values[2000], values[2001], values[2002] = math.inf, math.nan, 9.0
    values[400:800] = [math.nan] * 400
    differences, shown, _, means = curve_of(range(4000), values)
    kept = dict(zip(itertools.accumulate(differences), shown, strict=True))
    assert kept[2000] is None and kept[2002] == 9.0 and kept[400] is None
    assert means[1] is None and means[5] == pytest.approx((397 + 9) / 398, rel=1e-4)


def test_a_page_holds_its_data_and_names_no_other_file():
    data = {"runs": [1.5, None, "</script><b>"], "events-2": {"text": "é\n"}}
    page = html_page("Run <1>", "<main></main>", ["p {}"], ["let x = 1;"], data)
    assert blocks_of(page) == data
    assert "<title>Run &lt;1&gt;</title>" in page
    assert "<b>" not in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page.split("<body>")[0])


def test_the_policy_names_every_style_and_script_by_its_hash():
    page = html_page("x", "", ["p {}"], ["let x = 1;"], {})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.count("'sha256-") == 4  # page.css and page.js, and one more of both
    assert "unsafe" not in policy and policy.startswith("default-src 'none';")
