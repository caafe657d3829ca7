# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd lines and bytes in the files of a run stop neither a report nor a resumed run, and good lines survive."""

from __future__ import annotations

import gzip
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from explored_records import logit_rows, record_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reported_runs import blocks_of, write_run
from spoilt_lines import NO_OBJECTS, insert, spoilt, with_value, without

from megatron_selfdistill.instruments.explorer.target_page import explored_files, write_explored
from megatron_selfdistill.instruments.report.run_report import write_report
from megatron_selfdistill.loss import Target
from megatron_selfdistill.metrics.log import MetricsLog
from megatron_selfdistill.metrics.run_log import read_evaluation_samples, read_events, read_metrics, read_samples

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


@pytest.mark.parametrize("name", READERS)
def test_a_line_that_is_no_record_is_skipped_with_one_warning_that_names_it(run, tmp_path, caplog, name):
    (tmp_path / name).write_bytes((run / name).read_bytes())
    for odd in NO_OBJECTS:
        insert(tmp_path / name, 2, odd)
    assert READERS[name](tmp_path) == READERS[name](run)
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / name}: {len(NO_OBJECTS)} lines were skipped, the first: line 2, which ")


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
def test_a_resumed_run_keeps_the_good_lines_byte_for_byte_and_no_line_that_is_no_record(run, scratch, data):
    copy = copy_of(run, scratch / "resumed")
    done = data.draw(st.integers(1, 10))
    names = [name for name in READERS if name != "events.jsonl"]
    for name in names:
        (copy / name).write_bytes(data.draw(spoilt((run / name).read_bytes())))
    before = {name: (copy / name).read_bytes().split(b"\n")[:-1] for name in names}
    with closing(MetricsLog(copy, num_steps=10, console_every=0)) as log:
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


def test_a_configuration_that_cannot_be_read_is_a_warning_and_a_report_without_texts(run, tmp_path, caplog):
    copy = copy_of(run, tmp_path / "run")
    (copy / "config.yaml").write_text("a: [")
    blocks = blocks_of(write_report([copy]).read_text())
    assert "samples" not in blocks and blocks["overview"]["runs"][0]["facts"]
    (warning,) = caplog.messages
    assert warning.startswith(f"{copy / 'config.yaml'} is not the configuration of a run")


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
