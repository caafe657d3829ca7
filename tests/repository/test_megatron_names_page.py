# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page about Megatron's private names lists the names that the package uses, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "megatron_names.md").read_text(encoding="utf-8")
USES = load_script(REPOSITORY / "tools" / "megatron_names.py").uses()


def listed(*sections: str) -> set[str]:
    """Return the names in the first columns of the page's tables in ``sections``, which begin with these words."""
    parts = [part for part in PAGE.split("\n## ") if part.startswith(sections)]
    assert len(parts) == len(sections)
    columns = (line.split(" | ")[0] for part in parts for line in part.splitlines() if line.startswith("| `"))
    return {name for column in columns for name in re.findall(r"`([\w.]+)`", column)}


def used() -> set[str]:
    return {use.private_name for use in USES if use.private_name is not None}


def test_the_page_lists_every_private_and_every_replaced_name_and_no_other():
    on_page, in_use = listed("High", "Medium", "Replaced"), used()
    assert len(in_use) > 30
    assert (sorted(in_use - on_page), sorted(on_page - in_use)) == ([], [])


def test_the_risk_of_a_private_name_is_high_if_and_only_if_it_is_replaced():
    replaced = {use.private_name for use in USES if use.kind == "replaced"}
    private = {name for name in used() if name.partition(".")[2].startswith("_") and "__" not in name}
    assert listed("High") == private & replaced
    assert listed("Medium") == private - replaced


def test_the_other_names_of_the_page_are_in_use():
    in_use = {".".join(use.name.split(".")[-2:]) for use in USES}
    assert sorted(listed("Low") - in_use) == []


def test_the_page_says_for_every_name_what_would_replace_it():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and " | yes | " in line]
    assert len(rows) > 30
    assert [row for row in rows if len(row.strip("| ").split(" | ")) != 7] == []
