# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys and commands of pages exist, those of a first run run, and no page installs the project from an index."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from scripts import page_of_method

from megatron_selfdistill.config import keys, load
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.evaluate.evaluate_command import comparison_arguments, evaluation_arguments
from megatron_selfdistill.interop.convert_command import _parser as convert_parser

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS, TUTORIAL = REPOSITORY / "docs", REPOSITORY / "examples" / "tutorial"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_KEYS = [*PAGES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
FIRST = ("README", "quickstart", "your_data", "first_run", "monitoring")
"""The pages that a new user reads first, as far as they show commands."""
WRITTEN_FOR_READERS = re.compile(r"(^|\s)(\.\.\.|\[|\(|<)")
"""What stands in a command that shows a part of itself only."""


def commands(text: str) -> Iterator[list[str]]:
    """Return the words of each complete command of ``selfdistill`` and of torchrun in the code blocks of a page."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if not re.match(r"(selfdistill|torchrun) ", line) or WRITTEN_FOR_READERS.search(line.partition(" #")[0]):
                continue
            words = shlex.split(line, comments=True)
            if words[0] == "torchrun":
                module = words.index("-m") + 1 if "-m" in words else None
                if module is None or not words[module].startswith("megatron_selfdistill"):
                    continue
                words = ["selfdistill", *(["train"] if words[module].endswith(".train") else []), *words[module + 1 :]]
            yield words[1:]


def own_method_in(directory: Path) -> Path:
    """Write the module that the page about an own method shows, and return the directory."""
    page = (DOCS / "your_model.md").read_text(encoding="utf-8")
    block = page.partition("Write this file as `my_method.py`:\n\n```python\n")[2]
    (directory / "my_method.py").write_text(block.partition("\n```\n")[0])
    return directory


def read(words: list[str]) -> None:
    """Let the command's own code read the ``words`` of its command line, where it trains, plans, evaluates or converts.

    Raises: whatever this code raises for an option or a key that does not exist.
    """
    name, rest = words[0], [word for word in words[1:] if not word.endswith(".yaml")]
    if name == "evaluate" and rest[:1] == ["compare"]:
        comparison_arguments(rest[1:])
    elif name == "evaluate":
        load(evaluation_arguments(rest).overrides)
    elif name == "convert":
        convert_parser().parse_args(rest)
    elif name in ("train", "plan") or "=" in name:
        given = rest[rest[:1] == ["--ranks"] and 2 :] if name in ("train", "plan") else words
        load([word for word in given if not re.match("--|export=true|model=.*/", word)])


@pytest.mark.parametrize("page", [pytest.param(p, marks=() if p.stem in FIRST else pytest.mark.full) for p in PAGES])
def test_every_command_that_a_page_shows_can_be_read(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(own_method_in(tmp_path))
    for words in commands(page.read_text(encoding="utf-8")):
        read(words)


@pytest.mark.full
def test_every_command_that_the_page_of_a_method_shows_can_be_read():
    for name in method_names():
        found = list(commands(page_of_method(name)))
        assert found, name
        for words in found:
            read(words)


@pytest.mark.parametrize("line", ["selfdistill train data.pth=a", "selfdistill evaluate --hf a --data b --oout c"])
def test_a_mistyped_command_is_found(line):
    (words,) = commands(f"```\n{line}   # a comment\n```\n")
    with pytest.raises((ConfigError, SystemExit)):
        read(words)


ON_A_TINY_MODEL = {"Qwen/Qwen3-1.7B|runs/real_model/hf": "./hf", "held_out|other": "problems"}
ON_A_TINY_MODEL |= {"examples/tutorial": str(TUTORIAL)}
SHORT = ["data.teacher_template={problem}H{solution}|", "rollout.max_new_tokens=8"]
FEW_STEPS = "num_steps=1 data.global_batch_size=4 evaluation.path=problems.jsonl schedule.max_tokens=8192".split()
IN_ORDER = {"first_run": "plan evaluate train evaluate evaluate", "tutorial": "evaluate train train"}


@pytest.mark.full
@pytest.mark.parametrize("page", IN_ORDER)
def test_the_commands_of_a_first_run_and_of_the_tutorial_run_as_they_stand_on_a_tiny_model(tmp_path, monkeypatch, page):
    monkeypatch.setenv("PYTHONPATH", str(TUTORIAL), prepend=os.pathsep)
    tiny.model_with_data(tmp_path, 4, checkpoint=False)
    shown = commands((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    shown = [words for words in shown if not re.search("8[bB]|recipe=|doctor", " ".join(words))]
    assert [words[0] for words in shown] == IN_ORDER[page].split()
    for words in shown:
        for names, small in ON_A_TINY_MODEL.items():
            words = [re.sub(names, small, word) for word in words]
        more = [*SHORT, *FEW_STEPS] if words[0] == "train" else SHORT[1 - ("--hinted" in words) :]
        words += [] if words[1] == "compare" or words[0] == "plan" else more
        program = [sys.executable, "-m", "megatron_selfdistill", *words]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert words[1] != "compare" or ("greedy_accuracy" in done.stdout and "not the same in both" not in done.stdout)


def installs_by_name(text: str) -> list[str]:
    """Return the commands of pip that would fetch this project from an index, where nobody holds its name."""
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # a message may continue in the string of the next line
    word = r"[\"']?(?!megatron[_-]selfdistill)[\w.\[\]<>=,-]+[\"']?"
    pattern = rf"\bpip3? install(?: +{word})* +\\?[\"']?megatron[_-]selfdistill\b"
    return [found[0] for found in re.finditer(pattern, joined, re.IGNORECASE)]


def test_nobody_is_told_to_install_the_project_from_an_index():
    roots = ("megatron_selfdistill", "docs", "examples", "experiments", "tools", "configs", ".ci")
    endings = (".md", ".py", ".sh", ".sbatch", ".yaml", ".js", ".html", ".txt", "")
    files = [*WITH_KEYS, REPOSITORY / "Makefile", *(path for root in roots for path in (REPOSITORY / root).rglob("*"))]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file() and path.suffix in endings}
    assert {path: found for path, text in texts.items() if (found := installs_by_name(text))} == {}


def unknown_keys(text: str) -> set[str]:
    """Return what a text sets as a key of a section, as in ``data.pth=a``, and what names none."""
    sections = {key.partition(".")[0] for key in keys()} - {"method", "teachers"}  # users name keys of their own there
    named = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)=", text))
    return named - set(keys()) - {key.rpartition(".")[0] for key in keys()}


@pytest.mark.parametrize("page", WITH_KEYS, ids=lambda page: page.name)
def test_every_key_that_a_page_names_exists(page):
    own, _, of_others = page.read_text(encoding="utf-8").partition("\n## Coming from another program\n")
    assert unknown_keys(own + re.sub(r"(?m)^\|[^|]*\|", "|", of_others)) == set()  # a first cell has others' words


def test_every_key_that_the_page_of_a_method_names_exists():
    assert {name: found for name in method_names() if (found := unknown_keys(page_of_method(name)))} == {}


def test_a_mistyped_key_is_found():
    assert unknown_keys("data.pth=a data.path=b") == {"data.pth"}
