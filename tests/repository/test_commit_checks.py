# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Commits have short subjects of one form and no large files, and the hooks read the changed files alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
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


def test_the_history_is_read_from_the_last_tag_on_or_for_ten_commits(tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    assert commit_checks.recent_subjects(tmp_path) == []
    git("init")
    for number in range(22):
        git("commit", "--allow-empty", "-m", f"[a] Commit {number}")
    assert commit_checks.recent_subjects(tmp_path) == [f"[a] Commit {number}" for number in range(21, 11, -1)]
    git("tag", "-a", "v1.0.0", "-m", "one")
    git("commit", "--allow-empty", "-m", "a bad subject")
    assert commit_checks.recent_subjects(tmp_path) == ["a bad subject"]


def test_a_file_above_the_limit_is_named(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * commit_checks.MOST_KIB * 1024)
    large.write_bytes(b"x" * (commit_checks.MOST_KIB * 1024 + 1))
    (sentence,) = commit_checks.large_files([small, large, tmp_path / "deleted"])
    assert sentence.startswith(f"{large} has 500 KiB")


def test_every_hook_runs_the_check_that_it_names():
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    assert "ruff check" in entries["ruff"] and "ruff format --check" in entries["ruff-format"]
    assert entries["codespell"].endswith("bin/codespell")
    assert entries["large-files"].endswith("tools/commit_checks.py files")
    assert entries["subject"].endswith("tools/commit_checks.py subject")


def test_ci_checks_the_subjects_of_the_history():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "tools/commit_checks.py history" in makefile.partition("\ncheck: ")[2].partition("\n\n")[0]
    assert '\nstage "make check" make check\n' in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_the_hooks_get_the_changed_files_and_leave_what_needs_the_whole_project_to_ci():
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert local["repo"] == "local" and {"ruff", "ruff-format", "codespell", "large-files", "subject"} == set(hooks)
    assert all(hook.get("pass_filenames", True) and "always_run" not in hook for hook in hooks.values())
    assert not any("mypy" in hook["entry"] or "make" in hook["entry"] for hook in hooks.values())
    assert hooks["subject"]["stages"] == ["commit-msg"]
