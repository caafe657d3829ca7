# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/newest_versions.py shows no secret of the package index."""

from __future__ import annotations

from pathlib import Path

from scripts import load_script

TOOL = Path(__file__).resolve().parents[2] / "tools" / "newest_versions.py"


def test_without_an_answer_the_script_ends_with_2_and_one_sentence_without_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    assert load_script(TOOL).main() == 2
    written = capsys.readouterr().err
    assert "does not answer: http://127.0.0.1:9/simple/" in written and written.count("\n") == 1
    assert "secret" not in written
