# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pages about data and evaluation name keys that exist, and their examples are read as they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_selfdistill.config import keys
from megatron_selfdistill.data.files import FORMATS
from megatron_selfdistill.data.problems import load_problems
from megatron_selfdistill.data.prompts import DEFAULT_TEACHER_TEMPLATE
from megatron_selfdistill.verify import BUILT_IN

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["data.md", "evaluation.md"])
def test_every_key_that_a_page_names_exists(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    sections = {key.partition(".")[0] for key in keys()}
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_]+)(?![\w./])", text))
    known = set(keys()) | {f"{name}.json" for name in sections} | {f"{name}.md" for name in sections}
    assert len(named) > 5 and named - known - {"data.jsonl"} == set()


def test_the_page_about_data_shows_every_format_and_records_that_are_read(tmp_path):
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    assert [ending for ending in FORMATS if f"{ending}`" not in text] == []
    (example,) = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    (tmp_path / "problems.jsonl").write_text(example)
    assert [problem.answer for problem in load_problems(tmp_path / "problems.jsonl").problems] == ["92", None]
    wording = len(DEFAULT_TEACHER_TEMPLATE) - len("{problem}{solution}")
    assert f"The default wording has {wording} characters" in text


def test_the_page_about_evaluation_has_every_verifier():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in BUILT_IN if f"| `{name}`" not in text] == []
