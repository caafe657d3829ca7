# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Python code in a tokenizer's directory runs only if a key allows it, for any answer of a terminal."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers import dynamic_module_utils

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]

EVIL = """
from transformers import PreTrainedTokenizerFast
open({ran!r}, "w").write("it ran")
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def directory(chat_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of problems and of a working tokenizer whose class is in evil.py."""
    directory = tmp_path / "tokenizer"
    shutil.copytree(chat_directory, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    (tmp_path / "problems.jsonl").write_text(json.dumps({"problem": "3+4?", "solution": "7", "answer": "7"}) + "\n")
    # transformers appends the place of copied code to sys.path for ever: the code would import from an earlier test's.
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return directory


@pytest.fixture(params=["a terminal that answers y", "no terminal"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make standard input and output a pseudo-terminal with many a "y" typed into it, or make input empty."""
    if request.param == "no terminal":
        with open(os.devnull) as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            yield
        return
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\ny\n")
    with os.fdopen(theirs, "r+b", buffering=0) as raw, open(raw.fileno(), closefd=False) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert sys.stdin.isatty()
        yield
    os.close(ours)


def config_of(directory: Path, **data: object):
    problems = str(directory.parent / "problems.jsonl")
    sections = {"evaluation": {"path": problems}, "rollout": {"max_new_tokens": 10}}
    return from_mapping({"data": {"path": problems, "tokenizer": str(directory), **data}, **sections})


@pytest.mark.parametrize("load", [RunData.load, RunData.load_evaluation], ids=["training", "evaluation"])
def test_remote_code_never_runs_unless_the_key_allows_it(directory, terminal, load):
    with pytest.raises(ConfigError, match=rf"{directory}.*data\.trust_remote_code=true"):
        load(config_of(directory))
    assert not (directory.parent / "ran").exists()
    assert type(load(config_of(directory, trust_remote_code=True)).tokenizer._tokenizer).__name__ == "EvilTokenizer"
    assert (directory.parent / "ran").read_text() == "it ran"


def test_a_directory_whose_class_transformers_knows_loads_without_its_code(directory, terminal):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(directory).encode("seven")
    assert not (directory.parent / "ran").exists()


def test_remote_code_and_a_name_of_the_hub_that_fail_are_one_sentence(directory, monkeypatch):
    (directory / "evil.py").write_text("raise RuntimeError('not today\\nnor tomorrow')\n")
    with pytest.raises(ConfigError, match=r"tokenizer: not today$"):
        RunData.load(config_of(directory, trust_remote_code=True))

    def from_pretrained(name, **options):
        raise OSError("no connection\nwith details")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"got lab/model: there is no such directory here, .* \(no connection\)$"):
        load_tokenizer("lab/model")


def test_whatever_is_loaded_with_transformers_says_whether_it_trusts_the_directory():
    calls = [
        (path.name, node.lineno, {keyword.arg for keyword in node.keywords})
        for directory in ("megatron_selfdistill", "tools")
        for path in sorted((REPOSITORY / directory).rglob("*.py"))
        if re.search(r"\.from_(pretrained|config)\(", text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    assert calls and [call for call in calls if "trust_remote_code" not in call[2]] == []
