# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page about Megatron's private names lists the names that the package uses, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import load_script

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "tools" / "megatron_names.md").read_text(encoding="utf-8")
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
