# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The changelog is short, its newest release is the version, and every place names the same version."""

from __future__ import annotations

import re

import pytest
from tiny_run import REPOSITORY

from megatron_selfdistill import __version__

CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = {
    found[1]: found[2] for found in re.finditer(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## |\Z)", CHANGELOG, re.M | re.S)
}
MOST_ENTRIES, MOST_LINES = 30, 2


def entries(text: str) -> list[str]:
    """Return the entries of a section, each with all of its lines."""
    return re.findall(r"^- .*(?:\n(?![-#\n]).*)*", text, re.MULTILINE)


@pytest.mark.parametrize("release", [name for name in RELEASES if name != "Unreleased"])
def test_a_release_has_few_and_short_entries(release):
    found = entries(RELEASES[release])
    assert 0 < len(found) <= MOST_ENTRIES
    assert [entry for entry in found if entry.count("\n") + 1 > MOST_LINES] == []
    assert max(len(line) for entry in found for line in entry.splitlines()) <= 160


def test_the_newest_release_is_the_version_of_the_package_and_of_the_citation():
    newest = next(name for name in RELEASES if name != "Unreleased")
    date = re.search(rf"^## \[{re.escape(newest)}\] - (\d{{4}}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert newest == __version__ and date is not None
    assert f"\nversion: {newest}\n" in citation and f'\ndate-released: "{date[1]}"\n' in citation
