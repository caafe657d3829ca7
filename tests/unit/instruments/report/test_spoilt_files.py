# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd lines and bytes in the files of a run stop neither a report nor a resumed run, and good lines survive."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from explored_records import logit_rows, record_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reported_runs import blocks_of, write_run
from spoilt_lines import NO_OBJECTS, ODD_VALUES, insert, spoilt, with_value, without

from megatron_selfdistill.instruments.explorer import target_page
from megatron_selfdistill.instruments.explorer.target_page import explored_files, write_explored, write_target_pages
from megatron_selfdistill.instruments.report.run_record import read_runs
from megatron_selfdistill.instruments.report.run_report import report_page, write_report
from megatron_selfdistill.loss import Target
from megatron_selfdistill.metrics import MetricsLog
from megatron_selfdistill.run_log import read_evaluation_samples, read_events, read_metrics, read_samples

READERS = {
    "metrics.jsonl": read_metrics,
    "events.jsonl": read_events,
    "samples.jsonl": read_samples,
    "evaluation_samples.jsonl": read_evaluation_samples,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a small run directory, which tests copy."""
    return write_run(tmp_path_factory.mktemp("runs") / "first", 10, text="a response")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("spoilt")


def copy_of(run: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(run, place))


def test_a_named_pipe_in_place_of_a_file_is_no_file(run, tmp_path):
    copy = copy_of(run, tmp_path / "run")
    for name in ("config.yaml", *(name for name in READERS if name != "metrics.jsonl")):
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
    (found,) = read_runs([copy])
    assert (found.config, found.events, found.samples) == ({}, [], []) and found.metrics


def test_a_run_directory_whose_name_is_no_text_has_a_report(run, tmp_path):
    copy = copy_of(run, tmp_path / "\udcff")
    assert "\\udcff" in write_report([copy]).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READERS)
def test_a_line_that_is_no_record_is_skipped_with_one_warning_that_names_it(run, tmp_path, caplog, name):
    (tmp_path / name).write_bytes((run / name).read_bytes())
    for odd in NO_OBJECTS:
        insert(tmp_path / name, 2, odd)
    assert READERS[name](tmp_path) == READERS[name](run)
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / name}: {len(NO_OBJECTS)} lines were skipped, the first: line 2, which ")


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b"[1, 2]", "is not an object but a list"),
        (b"null", "is not an object but null"),
        (b"\xff", "is not text in UTF-8"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"step": "3"}', "has no step, an integer from 0 on"),
        (b'{"step": 3, "loss/mean": null}', "has no number as its loss/mean"),
        (b'{"step": 3, "\\u001b[2J": "text"}', r"has no number as its \x1b[2J"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_the_warning_says_what_is_odd(tmp_path, caplog, odd, reason):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + odd + b"\n")
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: 1 line was skipped, the first: line 2, which {reason}"]


def test_a_line_of_metrics_with_a_value_that_is_no_number_is_skipped(run, tmp_path, caplog):
    line = (run / "metrics.jsonl").read_bytes().splitlines()[3]
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    for odd in ("three", None, [1], {"a": 1}, True, 10**400):
        insert(tmp_path / "metrics.jsonl", 4, with_value(line, "loss/mean", odd))
    assert read_metrics(tmp_path) == read_metrics(run)
    assert "6 lines were skipped" in caplog.text


def test_a_sample_whose_turn_has_a_value_of_another_form_is_skipped(run, tmp_path, caplog):
    line = (run / "samples.jsonl").read_bytes().splitlines()[0]
    fields = {"episode": 0, "turn": 1, "reward": 0.5, "hint": "north", "reply": None}
    for name, value in fields.items():
        line = with_value(line, name, value)
    (tmp_path / "samples.jsonl").write_bytes(line + b"\n")
    for name in fields:
        insert(tmp_path / "samples.jsonl", 1, with_value(line, name, [1]))
    for reward in (math.inf, math.nan, True):
        insert(tmp_path / "samples.jsonl", 1, with_value(line, "reward", reward))
    (kept,) = read_samples(tmp_path)
    assert {name: kept[name] for name in fields} == fields
    assert "8 lines were skipped" in caplog.text


@pytest.mark.parametrize("name", READERS)
def test_a_line_without_a_step_is_skipped(run, tmp_path, caplog, name):
    (tmp_path / name).write_bytes((run / name).read_bytes())
    line = (run / name).read_bytes().splitlines()[0]
    insert(tmp_path / name, 3, without(line, "step"))
    for step in ("three", None, 1.5, True, -1, 10**400, float("nan")):
        insert(tmp_path / name, 1, with_value(line, "step", step))
    assert READERS[name](tmp_path) == READERS[name](run)
    assert "8 lines were skipped, the first: line 1, which has no step" in caplog.text


def test_a_line_that_a_kill_cut_short_is_no_reason_to_warn(run, tmp_path, caplog):
    copy = copy_of(run, tmp_path / "run")
    for name, read in READERS.items():
        (copy / name).write_bytes((copy / name).read_bytes()[:-9])
        assert read(copy) == read(run)[:-1]
    assert caplog.messages == []


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])  # to shrink a fault takes minutes
@given(data=st.data())
def test_a_report_of_spoilt_files_shows_the_good_lines(run, scratch, data):
    copy = copy_of(run, scratch / "run")
    for name in data.draw(st.sets(st.sampled_from(sorted(READERS)), min_size=1)):
        (copy / name).write_bytes(data.draw(spoilt((run / name).read_bytes())))
    blocks = blocks_of(write_report([copy]).read_text())
    good = read_metrics(copy)
    assert len(good) >= len(read_metrics(run)) - 3
    shown = blocks["curves"]["loss/mean"][0]
    losses = {line["step"]: line["loss/mean"] for line in good if "loss/mean" in line}
    steps = [sum(shown[0][: i + 1]) for i in range(len(shown[0]))]
    assert dict(zip(steps, shown[1], strict=True)) == {
        step: pytest.approx(value, rel=1e-4) if math.isfinite(value) else None for step, value in losses.items()
    }
    for name, block in (("samples.jsonl", "samples"), ("evaluation_samples.jsonl", "evaluations")):
        assert len(blocks.get(block, [[]])[0]) == len(READERS[name](copy))


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])  # to shrink a fault takes minutes
@given(data=st.data())
def test_a_resumed_run_keeps_the_good_lines_byte_for_byte_and_no_line_that_is_no_record(run, scratch, data):
    copy = copy_of(run, scratch / "resumed")
    done = data.draw(st.integers(1, 10))
    names = [name for name in READERS if name != "events.jsonl"]
    for name in names:
        (copy / name).write_bytes(data.draw(spoilt((run / name).read_bytes())))
    before = {name: (copy / name).read_bytes().split(b"\n")[:-1] for name in names}
    with MetricsLog(copy, num_steps=10, console_every=0) as log:
        log.resume(done)
    for name in names:
        after = (copy / name).read_bytes().split(b"\n")[:-1]
        assert after == [line for line in before[name] if step_of(line) is not None and step_of(line) <= done]


def step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return step if type(step) is int and 0 <= step < 2**53 else None


@pytest.mark.parametrize("value", [*ODD_VALUES[:-1], {1: {2: [3]}}, datetime.date(2026, 1, 1)], ids=repr)
def test_a_report_shows_a_run_with_any_values_in_its_configuration(run, scratch, value):
    copy = copy_of(run, scratch / "configured")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    sections = {"data", "model", "rollout", "parallel", "optimizer", "target", "guards"}
    for leaves in (False, True):
        changed = {
            key: dict.fromkeys(inner, value) if leaves and key in sections else value for key, inner in stored.items()
        }
        changed |= {"data": stored["data"], "conversations": {"show_contents": True}} if leaves else {}
        (copy / "config.yaml").write_text(yaml.safe_dump(changed))
        overview = blocks_of(report_page(read_runs([copy, run])))["overview"]
        assert [shown["label"] for shown in overview["runs"]] == ["configured", "first"]


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 3000 + "1" + "}" * 3000, "a: &a {b: *a}", "\xff", "a: [", "7"])
def test_a_configuration_that_cannot_be_read_is_a_warning_and_a_report_without_texts(run, tmp_path, caplog, text):
    copy = copy_of(run, tmp_path / "run")
    (copy / "config.yaml").write_bytes(text.encode("latin-1"))
    blocks = blocks_of(write_report([copy]).read_text())
    assert "samples" not in blocks and blocks["overview"]["runs"][0]["facts"]
    (warning,) = caplog.messages
    assert warning.startswith(f"{copy / 'config.yaml'} is not the configuration of a run")


def test_an_explored_file_without_settings_or_blocks_is_a_warning_and_no_page(tmp_path, caplog):
    record = record_of(logit_rows(3, 300, 2), Target(anchor="student"), step=5)
    odd = [record | {"settings": None}, record | {"blocks": 2.5}, {"version": record["version"]}]
    write_explored(tmp_path, 5, [record, *({"problem_id": "odd"} | one for one in odd)])
    assert [page.sample for page in write_target_pages(tmp_path)] == [1]
    assert len(caplog.messages) == 3 and all(".json.gz has no page: " in message for message in caplog.messages)


def test_an_explored_file_that_is_no_record_is_a_warning_and_no_page(run, tmp_path, caplog):
    copy = copy_of(run, tmp_path / "run")
    contents = [b"[" * 100_000, b"\xff", b"7", b"{}", b"{"]
    write_explored(copy, 5, [record_of(logit_rows(3, 300, 2), Target(anchor="student"), step=5)] * 7)
    for path, content in zip(explored_files(copy), contents, strict=False):
        path.write_bytes(gzip.compress(content))
    explored_files(copy)[5].write_bytes(b"not compressed")
    (pages,) = blocks_of(write_report([copy]).read_text())["overview"]["explored"]
    assert [page["sample"] for page in pages] == [7] and len(caplog.messages) == 6
    assert "step_0000005_1.json.gz has no page" in caplog.text
    assert caplog.messages[5].endswith("has no page: BadGzipFile: Not a gzipped file (b'no')")


def test_an_explored_file_is_read_to_a_bound_and_a_pipe_is_not_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(target_page, "MAX_BYTES", 1000)
    (tmp_path / "explored").mkdir()
    (tmp_path / "explored" / "step_0000001_1.json.gz").write_bytes(gzip.compress(b" " * 10**6))
    os.mkfifo(tmp_path / "explored" / "step_0000001_2.json.gz")
    assert write_target_pages(tmp_path) == [] and len(caplog.messages) == 1


@pytest.mark.parametrize("fault", ["is a directory", "is cut", "is of another version"])
def test_the_warning_about_an_explored_file_names_the_file_once(tmp_path, caplog, fault):
    record = record_of(logit_rows(3, 300, 2), Target(anchor="student"), step=5)
    (path,) = write_explored(tmp_path, 5, [record | {"version": 0} if fault == "is of another version" else record])
    if fault == "is a directory":
        path.unlink()
        path.mkdir()
    if fault == "is cut":
        path.write_bytes(path.read_bytes()[:-20])
    assert write_target_pages(tmp_path) == []
    (message,) = caplog.messages
    assert message.startswith(f"{path} has no page: ") and message.count(path.name) == 1
