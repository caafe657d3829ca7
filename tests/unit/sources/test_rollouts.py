# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An odd line of a recording is an error that names the line."""

from __future__ import annotations

import pytest

from megatron_selfdistill.sources.recordings import Recording


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b"[1, 2]", r"got '\[1, 2\]\\n' \(is not an object\)"),
        (b"\xff", r"\(is not JSON in UTF-8"),
        (b"[" * 100_000, r"\(is not JSON in UTF-8"),
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
