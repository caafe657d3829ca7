# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines of Python of the main house, of each annex, of the package and of the tests, beside their budgets.

    python tools/ring_budgets.py    prints one line for each; exits with 1 if a budget is exceeded

An annex is the folder of one option or of one kind of tools; everything else of the package is the main house.
Every line counts: comments, docstrings and empty lines, too.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "megatron_selfdistill"
BUDGETS = REPOSITORY / "tools" / "ring_budgets.toml"


def lines_of(directory: Path) -> dict[Path, int]:
    """Return the number of lines of each Python file, by its path relative to ``directory``."""
    files = sorted(directory.rglob("*.py"))
    return {file.relative_to(directory): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def measured(repository: Path, budgets: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of lines of everything that has a budget: main house, annexes, package and tests.

    A folder of the package without a budget of its own belongs to the main house.
    """
    package, found = lines_of(repository / PACKAGE.name), dict.fromkeys(budgets["lines"], 0)
    for path, number in package.items():
        found[path.parts[0] if len(path.parts) > 1 and path.parts[0] in found else "main house"] += number
    return {**found, "package": sum(package.values()), "tests": sum(lines_of(repository / "tests").values())}


def exceeded(found: Mapping[str, int], budgets: Mapping[str, Any]) -> list[str]:
    """Print each number of lines beside its budget; return a sentence for each excess."""
    for name, size in found.items():
        print(f"lines of {name:15} {size:6,} of {budgets['lines'][name]:6,}")
    return [
        f"lines of {name}: {size:,} are above the budget of {budgets['lines'][name]:,}: delete something; only a "
        f"commit that deletes at least as much may raise a budget of tools/{BUDGETS.name}."
        for name, size in found.items()
        if size > budgets["lines"][name]
    ]


def main() -> int:
    """Compare the package with its budgets; return 1 if one is exceeded, else 0."""
    budgets = tomllib.loads(BUDGETS.read_text(encoding="utf-8"))
    found = exceeded(measured(REPOSITORY, budgets), budgets)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
