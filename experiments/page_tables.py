# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of a page that are made from the lines of a map.

A table stands between <!-- table NAME --> and <!-- end NAME --> in the page.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import mean

from cell_lines import Line


def with_tables(page: str, rows_of: Callable[[str], Sequence[str]]) -> str:
    """Return the page with the rows ``rows_of(name)`` in the place of every table."""

    def written(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- table {match[1]} -->", *rows_of(match[1]), f"<!-- end {match[1]} -->"])

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end \1 -->", written, page, flags=re.DOTALL)


def write_or_compare(*pages: Path, rows_of: Callable[[str], Sequence[str]], compare: bool) -> int:
    """Write every table of the pages anew and return 0; or print what differs and return 1 if a table does."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    written = {page: with_tables(text, rows_of) for page, text in texts.items()}
    if compare:
        for page, text in texts.items():
            lines = (text.splitlines(keepends=True), written[page].splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*lines, str(page), "the recorded results", n=0))
        return int(written != texts)
    for page, text in written.items():
        page.write_text(text, encoding="utf-8")
    return 0


def complete(lines: Sequence[Line], arms: Collection[str]) -> list[Line]:
    """Return the lines of the seeds that have a line for every one of ``arms``."""
    of_seed: dict[int, set[str]] = {}
    for line in lines:
        of_seed.setdefault(line["seed"], set()).add(line["arm"])
    return [line for line in lines if of_seed[line["seed"]] >= set(arms)]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with these cells; the second row is the rule below the head."""
    return [f"| {' | '.join(row)} |" for row in rows]


def seeds_of(lines: Sequence[Line]) -> str:
    """Return the seeds of the lines as text."""
    seeds = sorted({line["seed"] for line in lines})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def spread(values: Sequence[float | None]) -> str:
    """Return the mean of the seeds with the lowest and highest in brackets; empty if a seed has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    shown: Callable[[float], str] = "{:.1f}".format if max(known) >= 10 else short
    if len(known) == 1:
        return shown(known[0])
    return f"{shown(mean(known))} [{shown(min(known))} {shown(max(known))}]"


def short(value: float) -> str:
    """Return a number with two digits after the point, or three below a tenth, without a leading zero."""
    text = f"{value:.3f}" if 0 < value < 0.0995 else f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text
