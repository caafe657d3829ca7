# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One name for one thing: no two public classes and no two files of the package share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "megatron_selfdistill").rglob("*.py"))


def repeated(names: list[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return each name that stands at two places or more, with the places as paths from the repository."""
    places = defaultdict(list)
    for name, file in names:
        places[name].append(str(file.relative_to(REPOSITORY)))
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_two_files_have_one_basename():
    assert repeated([(file.name, file) for file in FILES if file.name != "__init__.py"]) == {}


def test_no_two_public_classes_have_one_name():
    classes = [
        (node.name, file)
        for file in FILES
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert repeated(classes) == {}
