# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The metric keys that docs/metrics.md explains."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@functools.cache
def documented() -> tuple[str, ...]:
    """Return the keys in the first column of the page's last table; N and K stand for numbers, NAME for a teacher's."""
    table = PAGE.read_text().partition("## Every key of metrics.jsonl")[2]
    return tuple(re.findall(r"^\| `([a-z0-9_/]+(?:NAME|[NK])?)` \| [^|]+ \|$", table, re.MULTILINE))


def undocumented(keys: Iterable[str]) -> set[str]:
    """Return the keys that the page does not explain."""
    known = re.compile(
        "|".join(key.replace("NAME", r"[\w+-]+").replace("_N", r"_\d+").replace("_K", r"_\d+") for key in documented())
    )
    return {key for key in keys if not known.fullmatch(key.replace("evaluation_hinted/", "evaluation/"))}
