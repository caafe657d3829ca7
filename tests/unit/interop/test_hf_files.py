# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published Hugging Face directories: formats of weights, other files, types, and names that leave the directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from damage import Payload
from hf_contents import assert_same_tensors, config_of, tensors_of
from safetensors.torch import save_file

from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
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


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Which files hold the weights


@pytest.mark.parametrize("layout", ["sharded", "before PyTorch 1.6"])
def test_pytorch_model_bin_is_converted(directory, layout):
    tensors = tensors_of(directory)
    (directory / WEIGHTS).unlink()
    if layout == "sharded":
        names, weight_map = sorted(tensors), {}
        for file, part in (("pytorch_model-1.bin", names[::2]), ("pytorch_model-2.bin", names[1::2])):
            torch.save({name: tensors[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
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


# Types, and fields of config.json


def test_types_that_differ_between_tensors_come_back(directory):
    wide = {"norm", "lm_head"}
    types = {n: t if any(part in n for part in wide) else t.bfloat16() for n, t in tensors_of(directory).items()}
    tensors = write_tensors(directory, types)
    back, reports = there_and_back(directory)
    assert_equal(tensors_of(back), tensors)
    assert config_of(back)["dtype"] == "bfloat16" and not [line for line in reports if "become" in line]


def test_types_that_differ_within_one_tensor_of_megatrons_are_widened_and_reported(directory):
    narrow, tensors = "model.layers.2.self_attn.k_proj.weight", tensors_of(directory)
    tensors = write_tensors(directory, tensors | {narrow: tensors[narrow].bfloat16()})
    back, reports = there_and_back(directory)
    assert torch.equal(tensors_of(back)[narrow], tensors[narrow].float())
    assert [line for line in reports if line.startswith(f"{narrow} become float32")]


def test_half_precision_is_recorded_as_such(directory):
    write_tensors(directory, {name: tensor.half() for name, tensor in tensors_of(directory).items()})
    back, _ = there_and_back(directory)
    args = read_common(directory.parent / "megatron" / "release")["args"]
    assert (args.fp16, args.bf16, args.params_dtype) == (True, False, torch.float16)
    assert config_of(back)["dtype"] == "float16"
    assert {tensor.dtype for tensor in tensors_of(back).values()} == {torch.float16}


def test_fields_that_change_nothing_are_kept(directory, hf_directory):
    (directory / "config.json").write_text(json.dumps(config_of(directory) | {"hidden_act": "swish"}))
    back, _ = there_and_back(directory)
    assert config_of(back)["hidden_act"] == "swish"
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    found = [transformers.AutoModelForCausalLM.from_pretrained(where) for where in (back, hf_directory("llama2"))]
    with torch.no_grad():
        assert torch.equal(*(model(tokens).logits for model in found))
