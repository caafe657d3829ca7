# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines of Python in each ring of the package beside the budget of the ring (tools/ring_budgets.toml).

    python tools/ring_budgets.py    prints one line per ring, and exits with 1 if a budget is exceeded

The rings methods, interop and instruments are the directories of the package with these names; everything else is core.
Every line counts: comments, docstrings and empty lines, too.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "megatron_selfdistill"
BUDGETS = REPOSITORY / "tools" / "ring_budgets.toml"
RINGS = ("core", "methods", "interop", "instruments")


def ring_of(path: Path) -> str:
    """Return the ring of a file, given by its path relative to the package."""
    return path.parts[0] if len(path.parts) > 1 and path.parts[0] in RINGS[1:] else RINGS[0]


def measured(package: Path) -> tuple[Counter[str], int]:
    """Return the number of lines of each ring, and the number of Python files."""
    files = sorted(package.rglob("*.py"))
    lines: Counter[str] = Counter()
    for file in files:
        lines[ring_of(file.relative_to(package))] += len(file.read_text(encoding="utf-8").splitlines())
    return lines, len(files)


def exceeded(package: Path, budgets: Mapping[str, Any]) -> list[str]:
    """Print the size of each ring and the number of files beside the budgets; return a sentence for each excess."""
    lines, num_files = measured(package)
    sizes = [(f"lines of {ring}", lines[ring], budgets["lines"][ring]) for ring in RINGS]
    sizes.append(("Python files", num_files, budgets["files"]))
    for name, size, budget in sizes:
        print(f"{name:20} {size:6,} of {budget:6,}")
    return [
        f"{name}: {size:,} are above the budget of {budget:,}: delete something, or raise the budget in "
        f"tools/{BUDGETS.name} with the reason in the same commit."
        for name, size, budget in sizes
        if size > budget
    ]


def main() -> int:
    """Compare the package with its budgets; return 1 if one is exceeded, else 0."""
    found = exceeded(PACKAGE, tomllib.loads(BUDGETS.read_text(encoding="utf-8")))
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
