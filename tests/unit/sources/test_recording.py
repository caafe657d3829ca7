# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Files that list what a run has seen: an odd line of a recording is named, one of skipped turns stops nothing."""

from __future__ import annotations

import pytest

from megatron_selfdistill.sources.logged_turns import list_skipped
from megatron_selfdistill.sources.recording import Recording


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b"[1, 2]", r"got '\[1, 2\]\\n' \(is not an object but a list\)"),
        (b"\xff", r"\(is not text in UTF-8\)"),
        (b"[" * 100_000, r"\(is nested too deeply\)"),
        (b"{}", r"\('step'\)"),
    ],
    ids=lambda value: repr(value[:9]),
)
def test_an_odd_line_of_a_recording_is_an_error_with_file_and_line(tmp_path, odd, reason):
    path = tmp_path / "record.jsonl"
    path.write_bytes(odd + b"\n")
    with pytest.raises(
        ValueError, match=rf"record.jsonl:1: expected a response as rollout.record writes it, .*{reason}"
    ):
        Recording(path)


def test_a_byte_that_is_no_text_in_the_list_of_skipped_turns_stops_nothing(tmp_path):
    path = tmp_path / "skipped.txt"
    path.write_bytes(b"\xff\nlog.jsonl:3: too\xe2\x80\xa8long\n")
    list_skipped(path, ["log.jsonl:3: too\u2028long", "log.jsonl:4: too long"])
    assert path.read_bytes() == b"\xff\nlog.jsonl:3: too\xe2\x80\xa8long\nlog.jsonl:4: too long\n"
