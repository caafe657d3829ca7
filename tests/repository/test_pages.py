# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys that README and the pages name exist, and no page installs the project from an index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import page_of_method

from megatron_selfdistill.config import keys
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def installs_by_name(text: str) -> list[str]:
    """Return the commands of pip that would fetch this project from an index, where nobody holds its name."""
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # a message may continue in the string of the next line
    word = r"[\"']?(?!megatron[_-]selfdistill)[\w.\[\]<>=,-]+[\"']?"
    return [
        found[0]
        for found in re.finditer(
            rf"\bpip3? install(?: +{word})* +\\?[\"']?megatron[_-]selfdistill\b", joined, re.IGNORECASE
        )
    ]


def test_nobody_is_told_to_install_the_project_from_an_index():
    roots = ("megatron_selfdistill", "docs", "examples", "experiments", "tools", "configs", ".ci")
    endings = (".md", ".py", ".sh", ".sbatch", ".yaml", ".js", ".html", ".txt", "")
    files = [*PAGES, REPOSITORY / "Makefile", *(path for root in roots for path in (REPOSITORY / root).rglob("*"))]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file() and path.suffix in endings}
    assert {name_of(path): found for path, text in texts.items() if (found := installs_by_name(text))} == {}


def unknown_keys(text: str) -> set[str]:
    """Return what a text sets as a key of a section, as in ``data.pth=a``, and what names none."""
    sections = {key.partition(".")[0] for key in keys()} - {"method", "teachers"}  # users name keys of their own there
    named = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)=", text))
    return named - set(keys()) - {key.rpartition(".")[0] for key in keys()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_that_a_page_names_exists(page):
    own, _, of_others = page.read_text(encoding="utf-8").partition("\n## Coming from another program\n")
    assert unknown_keys(own + re.sub(r"(?m)^\|[^|]*\|", "|", of_others)) == set()  # a first cell has others' words


@pytest.mark.parametrize("name", method_names())
def test_every_key_that_the_page_of_a_method_names_exists(name):
    assert unknown_keys(page_of_method(name)) == set()


def test_a_mistyped_key_is_found():
    assert unknown_keys("data.pth=a data.path=b") == {"data.pth"}
