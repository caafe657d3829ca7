# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Commits have short subjects of one form and no large files."""

from __future__ import annotations

import sys

import pytest
from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import commit_checks


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("[loss] " + "A" * 65, None),
        ("[loss] " + "A" * 66, "has 73 characters, expected at most 72"),
        ("Add a loss", "another form"),
        ("[loss] add a loss", "another form"),
        ("", "another form"),
        ("Merge branch 'x' of a very long name that git has written by itself, for no one to read", None),
    ],
)
def test_a_subject_is_refused_for_its_length_or_its_form(subject, words, tmp_path, capsys):
    message = tmp_path / "message"
    message.write_text(
        f"# a comment of git\n\n{subject}\n\nA body of any length. {'x' * 100}\n" if subject else "# no\n"
    )
    assert commit_checks.main(["subject", str(message)]) == (words is not None)
    assert (words or "") in capsys.readouterr().err


def test_a_file_above_the_limit_is_named(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * commit_checks.MOST_KIB * 1024)
    large.write_bytes(b"x" * (commit_checks.MOST_KIB * 1024 + 1))
    (sentence,) = commit_checks.large_files([small, large, tmp_path / "deleted"])
    assert sentence.startswith(f"{large} has 500 KiB")
