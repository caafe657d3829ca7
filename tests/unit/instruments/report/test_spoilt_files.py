# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Odd lines and bytes in the files of a run stop neither a report nor a resumed run, and good lines survive."""

from __future__ import annotations

import gzip
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from explored_records import logit_rows, record_of
from reported_runs import blocks_of, write_run

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


NO_OBJECTS = [
    *(b"[1, 2]", b'"text"', b"7", b"null", b"NaN", b"{", b"\xff\xfe", b"\x00\x00\x00", b"[" * 100_000),
    b'{"step": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
]
"""Lines that are no objects with a step."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first", 10, text="a response")


def changed(line: bytes, lost: str = "", **values: Any) -> bytes:
    """Return a line of JSON without its key ``lost``, and with other values."""
    return json.dumps({key: value for key, value in json.loads(line).items() if key != lost} | values).encode()


def insert(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: number - 1], line + b"\n", *lines[number - 1 :]]))


def copy_of(run: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(run, place))


@pytest.mark.parametrize("name", READERS)
def test_a_line_that_is_no_record_is_skipped_with_one_warning_that_names_it(run, tmp_path, caplog, name):
    (tmp_path / name).write_bytes((run / name).read_bytes())
    for odd in NO_OBJECTS:
        insert(tmp_path / name, 2, odd)
    assert READERS[name](tmp_path) == READERS[name](run)
    line = (run / name).read_bytes().splitlines()[0]
    insert(tmp_path / name, 3, changed(line, lost="step"))
    for step in ("three", None, 1.5, True, -1, 10**400, float("nan")):
        insert(tmp_path / name, 1, changed(line, step=step))
    assert READERS[name](tmp_path) == READERS[name](run)
    first, second = caplog.messages
    assert first.startswith(f"{tmp_path / name}: {len(NO_OBJECTS)} lines were skipped, the first: line 2, which ")
    assert f"{len(NO_OBJECTS) + 8} lines were skipped, the first: line 1, which has no step" in second


def test_a_line_that_a_kill_cut_short_is_no_reason_to_warn(run, tmp_path, caplog):
    copy = copy_of(run, tmp_path / "run")
    for name, read in READERS.items():
        (copy / name).write_bytes((copy / name).read_bytes()[:-9])
        assert read(copy) == read(run)[:-1]
    assert caplog.messages == []


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"events.jsonl"}))
@pytest.mark.parametrize("done", [1, 7, 10])
def test_a_resumed_run_keeps_the_good_lines_byte_for_byte_and_no_line_that_is_no_record(run, tmp_path, name, done):
    copy = copy_of(run, tmp_path / "run")
    good = (run / name).read_bytes().splitlines()
    odd = [*NO_OBJECTS, changed(good[0], lost="step"), good[-1][:9] + b"\xff" + good[-1][10:]]
    spaced = [line.replace(b": ", b":  ") for line in good]
    (copy / name).write_bytes(b"\n".join([*odd, *(each for line in spaced for each in (line, odd[0]))]) + b"\n")
    with closing(MetricsLog(copy, num_steps=10, console_every=0)) as log:
        log.resume(done)
    kept = [line for line in spaced if json.loads(line)["step"] <= done]
    assert (copy / name).read_bytes().splitlines() == kept


def test_a_configuration_that_cannot_be_read_is_a_warning_and_a_report_without_texts(run, tmp_path, caplog):
    copy = copy_of(run, tmp_path / "run")
    (copy / "config.yaml").write_text("a: [")
    blocks = blocks_of(write_report([copy]).read_text())
    assert "samples" not in blocks and "evaluations" not in blocks and blocks["overview"]["runs"][0]["facts"]
    assert caplog.messages[0].startswith(f"{copy / 'config.yaml'}")


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
