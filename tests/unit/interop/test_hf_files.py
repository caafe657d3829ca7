# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published Hugging Face directories: formats of weights, other files, types, and names that leave the directory."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Payload
from hf_contents import assert_same_tensors, tensors_of
from safetensors.torch import save_file

from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.release import Progress

EMBEDDING, WEIGHTS, INDEX = "model.embed_tokens.weight", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(hf_directory, tmp_path) -> Path:
    """Return a copy of the directory of a model, which the test may change."""
    return Path(shutil.copytree(hf_directory("llama2"), tmp_path / "hf"))


def there_and_back(directory: Path) -> tuple[Path, list[str]]:
    """Convert ``directory`` to Megatron and back; return the new directory and what was reported on the way."""
    reports: list[str] = []
    out = directory.parent
    hf_to_megatron(directory, out / "megatron", progress=Progress(report=reports.append))
    return megatron_to_hf(out / "megatron", out / "back", progress=Progress(report=reports.append)), reports


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Which files hold the weights


def test_pytorch_model_bin_is_converted(directory):
    tensors = tensors_of(directory)
    (directory / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number}.bin"  # the second one as before PyTorch 1.6
        content = {name: tensors[name] for name in part}
        torch.save(content, directory / file, _use_new_zipfile_serialization=number == 0)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    back, _ = there_and_back(directory)
    assert_equal(tensors_of(back), tensors)
    assert not list(back.glob("*.bin*"))


def hold_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({EMBEDDING: Payload(directory.parent / "executed")}, directory / "pytorch_model.bin")


def link_out(directory: Path, name: str) -> None:
    (directory / name).rename(directory.parent / "elsewhere")
    (directory / name).symlink_to("../elsewhere")


def replaced(directory: Path, make: Callable[[Path], None]) -> None:
    (directory / "config.json").unlink()
    make(directory / "config.json")


def cut_off(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-1000])


def name_a_missing_file(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle that would run code": (hold_a_pickle, r"pytorch_model\.bin was refused: .*posix.system"),
    "weights that are a link out": (lambda hf: link_out(hf, WEIGHTS), rf"{WEIGHTS} .*SELFDISTILL_FOLLOW_LINKS=1"),
    "a configuration that is a link out": (lambda hf: link_out(hf, "config.json"), r"config\.json is a symbolic link"),
    "a pipe": (lambda hf: replaced(hf, os.mkfifo), r"config\.json is a named pipe"),
    "a directory": (lambda hf: replaced(hf, os.mkdir), r"config\.json is a directory"),
    "weights that are cut off": (cut_off, rf"{WEIGHTS} is corrupt or cut off"),
    "no weights": (lambda hf: (hf / WEIGHTS).unlink(), "has no weights"),
    "an index of nothing": (name_a_missing_file, r"lacks model-1\.safetensors"),
}
"""What is wrong with a directory -> how it comes about, and what the refusal names."""


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_directory_is_refused_by_the_file(directory, name):
    spoil, named = SPOILT[name]
    spoil(directory)
    with pytest.raises(CheckpointError, match=named):
        hf_to_megatron(directory, directory.parent / "out")
    assert not (directory.parent / "executed").exists() and not (directory.parent / "out").exists()


@pytest.mark.parametrize("kind", [WEIGHTS, "pytorch_model.bin"])
def test_an_index_may_only_name_files_of_its_directory(directory, kind):
    (directory / WEIGHTS).rename(directory.parent / "outside.safetensors")
    for name in ("../outside.safetensors", "/etc/hosts", "sub/model.safetensors", "..", "", "a\\b", 7):
        (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
        with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
            hf_to_megatron(directory, directory.parent / "out")


def test_a_user_can_vouch_for_the_links_of_a_directory(directory, monkeypatch):
    links = directory.parent / "links"
    links.mkdir()
    (directory / "notes.txt").write_text("notes")
    for file in directory.iterdir():
        (links / file.name).symlink_to(file)
    monkeypatch.setenv("SELFDISTILL_FOLLOW_LINKS", "1")
    back, _ = there_and_back(links)
    assert_same_tensors(back, directory)
    assert (back / "notes.txt").read_text() == "notes"


def test_links_of_the_hubs_cache_are_followed(directory):
    cache = directory.parent / "models--a--b"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    shutil.copytree(directory, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    hf_to_megatron(snapshot, directory.parent / "megatron")
    assert_same_tensors(megatron_to_hf(directory.parent / "megatron", directory.parent / "back"), directory)


# Which files are copied


def test_everything_but_weights_is_copied_both_ways(directory):
    files = {"tekken.json": "{}", "README.md": "a card", "modeling_own.py": "x = 1", "tokenization_own.py": "y = 2"}
    files |= {"additional_chat_templates/tool_use.jinja": "{{ messages }}"}
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)
    for name in ("optimizer.pt", "model.onnx", ".hidden", "hf_quant_config.json", "rust_model.ot.h5"):
        (directory / name).write_bytes(b"0")
    (directory.parent / "secret").write_text("a key")
    (directory / "notes.txt").symlink_to("../secret")
    (directory / "linked").symlink_to("..")
    back, reports = there_and_back(directory)
    for name, content in files.items():
        assert (back / name).read_text() == content
    copied = {str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()}
    assert copied == {"config.json", "generation_config.json", WEIGHTS, *files}
    assert [line for line in reports if line.startswith("notes.txt is not copied")]


# Types


def test_types_that_differ_come_back_but_within_one_tensor_of_megatrons_which_is_widened_and_reported(directory):
    wide, found = ("norm", "lm_head", "layers.2.self_attn.q_proj"), tensors_of(directory)
    tensors = {n: t if any(part in n for part in wide) else t.bfloat16() for n, t in found.items()}
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    back, reports = there_and_back(directory)
    assert_equal(tensors_of(back), {n: t.float() if re.search("[qkv]_proj", n) else t for n, t in tensors.items()})
    assert [line for line in reports if "k_proj" in line and "become float32" in line]
