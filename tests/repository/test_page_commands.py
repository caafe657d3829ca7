# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands that pages show: their options and keys exist, and those of a first run run as they stand."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_models
import pytest
import tiny_run
from scripts import page_of_method

from megatron_selfdistill.config import load
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.evaluate.evaluate_command import comparison_arguments, evaluation_arguments
from megatron_selfdistill.interop.convert_command import _parser as convert_parser

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS, TUTORIAL = REPOSITORY / "docs", REPOSITORY / "examples" / "tutorial"
FIRST = ("README.md", *(f"docs/{name}.md" for name in ("quickstart", "your_data", "first_run", "monitoring")))
"""The pages that a new user reads first, as far as they show commands."""
PAGES = list(dict.fromkeys([*FIRST, *sorted(str(path.relative_to(REPOSITORY)) for path in DOCS.rglob("*.md"))]))
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


def shown_on(page: str) -> list[list[str]]:
    return list(commands((REPOSITORY / page).read_text(encoding="utf-8")))


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


@pytest.mark.parametrize(
    "page", [page if page in FIRST else pytest.param(page, marks=pytest.mark.full) for page in PAGES]
)
def test_every_command_that_a_page_shows_can_be_read(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(own_method_in(tmp_path))
    for words in shown_on(page):
        read(words)


@pytest.mark.full
@pytest.mark.parametrize("name", method_names())
def test_every_command_that_the_page_of_a_method_shows_can_be_read(name):
    found = list(commands(page_of_method(name)))
    assert found
    for words in found:
        read(words)


@pytest.mark.parametrize("line", ["selfdistill train data.pth=a", "selfdistill evaluate --hf a --data b --oout c"])
def test_a_mistyped_command_is_found(line):
    (words,) = commands(f"```\n{line}   # a comment\n```\n")
    with pytest.raises((ConfigError, SystemExit)):
        read(words)


ON_A_TINY_MODEL = {
    "Qwen/Qwen3-1.7B|runs/real_model/hf": "./hf",
    "held_out|other": "problems",
    "examples/tutorial": str(TUTORIAL),
}
SHORT = ["data.teacher_template={problem}H{solution}|", "rollout.max_new_tokens=8"]
FEW_STEPS = "num_steps=1 data.global_batch_size=4 evaluation.path=problems.jsonl schedule.max_tokens=8192".split()
IN_ORDER = {"first_run": "plan evaluate train evaluate evaluate", "tutorial": "evaluate train train"}


@pytest.mark.full
@pytest.mark.parametrize("page", IN_ORDER)
def test_the_commands_of_a_first_run_and_of_the_tutorial_run_as_they_stand_on_a_tiny_model(tmp_path, monkeypatch, page):
    monkeypatch.setenv("PYTHONPATH", str(TUTORIAL), prepend=os.pathsep)
    tiny_run.write_data(tmp_path, 4)
    hf_models.write("qwen3", tmp_path / "hf", vocab_size=23)
    for path in (tmp_path / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "hf" / path.name)
    shown = [words for words in shown_on(f"docs/{page}.md") if not re.search("8[bB]|recipe=|doctor", " ".join(words))]
    assert [words[0] for words in shown] == IN_ORDER[page].split()
    for words in shown:
        words = [
            functools.reduce(lambda to, names: re.sub(*names, to), ON_A_TINY_MODEL.items(), word) for word in words
        ]
        more = [*SHORT, *FEW_STEPS] if words[0] == "train" else SHORT[1 - ("--hinted" in words) :]
        words += [] if words[1] == "compare" or words[0] == "plan" else more
        program = [sys.executable, "-m", "megatron_selfdistill", *words]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert words[1] != "compare" or ("greedy_accuracy" in done.stdout and "not the same in both" not in done.stdout)
