# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines of a map in results/: one line of JSON for each cell, which is one run of one seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
RESULTS = Path(__file__).resolve().parent / "results"
FURTHER_TABLES = Path(__file__).resolve().parent / "tables"
"""Pages with the tables that the documentation summarises."""
Line = Mapping[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a map, in the order in which they were measured; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_line(path: Path, line: Line, run: Path) -> None:
    """Append the line of a cell to a map, then remove the directory ``run`` of the cell and print the line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(run, ignore_errors=True)
    print(json.dumps(line), flush=True)
