# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks of a commit: its subject and the size of its files.

    python tools/commit_checks.py subject .git/COMMIT_EDITMSG    the message of the commit that is being made
    python tools/commit_checks.py history                        the commits since the last tag, or the last ten
    python tools/commit_checks.py files FILE ...                 files that are too large for the repository

The hooks of .pre-commit-config.yaml call the first and the third check, and `make check` calls the second one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_CHARACTERS = 72
MOST_KIB = 500
NUM_COMMITS = 10
"""The number of commits that `history` reads where no commit has a tag."""
FORM = re.compile(r"\[[a-z0-9_, /.-]+\] [A-Z]")
GIVEN_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ")


def fault_of(subject: str) -> str | None:
    """Return what is wrong with the subject of a commit in one sentence, or None.

    Git itself writes the subjects that begin with one of `GIVEN_BY_GIT`; they may have any form.
    """
    if subject.startswith(GIVEN_BY_GIT):
        return None
    if len(subject) > MOST_CHARACTERS:
        return f"{subject!r} has {len(subject)} characters, expected at most {MOST_CHARACTERS}: shorten the subject."
    if not FORM.match(subject):
        return f"{subject!r} has another form than '[area] Imperative subject': name the area first."
    return None


def subject_of(message: str) -> str:
    """Return the first line of a message that is neither empty nor one of git's comments."""
    lines = (line.strip() for line in message.splitlines() if not line.startswith("#"))
    return next((line for line in lines if line), "")


def recent_subjects(repository: Path) -> list[str]:
    """Return the subjects of the commits since the last tag, or of the last `NUM_COMMITS`; none without a history."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(repository), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if git("rev-parse", "--is-inside-work-tree") is None:
        return []
    tag = git("describe", "--tags", "--abbrev=0")
    commits = [f"--max-count={NUM_COMMITS}"] if tag is None else [f"{tag}..HEAD"]
    return (git("log", "--no-merges", "--format=%s", *commits) or "").splitlines()


def large_files(files: Sequence[Path]) -> list[str]:
    """Return one sentence for each file above `MOST_KIB`; a deleted file and a link have no size."""
    sizes = [(file, file.stat().st_size / 1024) for file in files if file.is_file() and not file.is_symlink()]
    return [
        f"{file} has {size:,.0f} KiB, expected at most {MOST_KIB}: keep large files outside of the repository."
        for file, size in sizes
        if size > MOST_KIB
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one check, and print each fault as a sentence; return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("subject", "history", "files"))
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    if options.check == "files":
        faults = large_files(options.files)
    elif options.check == "subject":
        faults = [found for file in options.files if (found := fault_of(subject_of(file.read_text(encoding="utf-8"))))]
    else:
        faults = [found for subject in recent_subjects(REPOSITORY) if (found := fault_of(subject))]
    for sentence in faults:
        print(sentence, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
