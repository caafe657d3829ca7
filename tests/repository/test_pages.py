# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""README and the pages: links and keys exist, README stays short, examples are read as the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import page_of_method

from megatron_selfdistill.cli import COMMANDS
from megatron_selfdistill.config import keys, method_keys
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "megatron_selfdistill"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]
NOT_KEYS = {
    *("loss.solver", "metrics.run_log", "metrics.tensorboard", "model.num_carried_mtp_layers"),
    *("rollout.extra_problems", "rollout.overlap"),
    *("method.right_weight", "loss.self_distillation_loss", "teachers.choose", "teachers.guide", "teachers.join"),
    *("loss.backward", "loss.item", "model.generate", "optimizer.step", "optimizer.zero_grad"),
    *("optimizer.multi_tensor_applier", "optimizer.multi_tensor_scale_impl"),
    *("model.safetensors", "report.html", "report.png", "target.html", "target.svg"),
}
"""Words of the form ``section.name`` that are no keys today: removed or renamed keys, Python, a user's key, files, and
entries of mappings."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings on which GitHub and MkDocs agree."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()
    found = set()
    for title in (line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)):
        github = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        if github == re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()):
            found.add(github)
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links of the page that lead to no file of the repository, or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    assert broken_links(page) == []


def missing_files(text: str) -> list[str]:
    """Return the Python files, with a directory, that a page names in code style and that do not exist.

    NAME stands for any name, so that a file with it is no file of today.
    """
    named = sorted(set(re.findall(r"`((?:[\w.]+/)+\w+\.py)`", text)))
    named = [name for name in named if "NAME" not in name]
    return [name for name in named if not any((root / name).exists() for root in (REPOSITORY, PACKAGE))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_python_file_that_a_page_names_exists(page):
    assert missing_files(page.read_text(encoding="utf-8")) == []


def test_the_design_names_directories_that_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    directories = {name for name in re.findall(r"`((?:[\w.]+/)+)`", text) if "NAME" not in name}
    assert len(directories) > 30
    assert {name for name in directories if not any((root / name).is_dir() for root in (REPOSITORY, PACKAGE))} == set()


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
    assert unknown_keys(page.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("name", method_names())
def test_every_key_that_the_page_of_a_method_names_exists(name):
    assert unknown_keys(page_of_method(name)) == set()


def test_a_mistyped_key_is_found():
    assert unknown_keys("`data.pth` and `data.path`") == {"data.pth"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w./=-])selfdistill ([a-z][a-z-]*)(?=[ `\n])", page.read_text(encoding="utf-8")))
    assert named <= COMMANDS.keys()


def test_every_message_that_the_page_about_troubles_quotes_is_one_of_the_package():
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "megatron_selfdistill").rglob("*.py"))
    messages = re.sub(r"\{[^{}\n]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", sources))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    quotes = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+)`", symptom)]
    parts = {part.strip(" ,.;:()?") for quote in quotes for part in quote.split("...")} - {
        "DistNetworkError",
        "EADDRINUSE",
    }
    assert len(quotes) > 25 and {part for part in parts if part not in messages} == set()
