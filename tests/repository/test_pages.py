# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys that README and the pages name exist, and no page installs the project from an index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import page_of_method

from megatron_selfdistill.config import keys
from megatron_selfdistill.config.key_list import method_keys
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
NOT_KEYS = {
    *("loss.solver", "metrics.run_log", "metrics.tensorboard", "model.num_carried_mtp_layers"),
    *("rollout.extra_problems", "rollout.overlap", "loss.guided_divergence", "target.guided_teacher_weight"),
    *("method.right_weight", "loss.self_distillation_loss", "teachers.choose", "teachers.guide", "teachers.join"),
    *("loss.backward", "loss.item", "model.generate", "model.external_lib", "optimizer.step", "optimizer.zero_grad"),
    *("optimizer.multi_tensor_applier", "optimizer.multi_tensor_scale_impl"),
    *("model.safetensors", "report.html", "report.png", "target.html", "target.svg"),
}
"""Words of the form ``section.name`` that are no keys today: removed or renamed keys, Python, a user's key, files, and
entries of mappings."""


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
    """Return the words of a text that have the form of a key, but name none."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    sections = {key.partition(".")[0] for key in keys()}
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_]+)(?![\w./])", text))
    of_methods = {key for name in method_names() for key in method_keys(name)}
    files = {f"{name}.{ending}" for name in sections for ending in ("json", "jsonl", "md", "py")}
    of_sections = {key.rpartition(".")[0] for key in keys()}
    return named - set(keys()) - of_sections - of_methods - files - NOT_KEYS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_that_a_page_names_exists(page):
    own, _, of_others = page.read_text(encoding="utf-8").partition("\n## Coming from another program\n")
    assert unknown_keys(own + re.sub(r"(?m)^\|[^|]*\|", "|", of_others)) == set()  # a first cell has others' words


def test_the_pages_are_few_and_short_and_six_of_them_come_first():
    pages = sorted(DOCS.rglob("*.md"))
    assert len(pages) <= 30 and sum(len(page.read_text(encoding="utf-8").split()) for page in pages) <= 50_000
    first = re.findall(r"^      - (\d)\. .*: \w+\.md$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert first == list("123456")


@pytest.mark.parametrize("name", method_names())
def test_every_key_that_the_page_of_a_method_names_exists(name):
    assert unknown_keys(page_of_method(name)) == set()


def test_a_mistyped_key_is_found():
    assert unknown_keys("`data.pth` and `data.path`") == {"data.pth"}
