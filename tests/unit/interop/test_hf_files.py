# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published Hugging Face directories: formats of weights, other files, types, and names that leave the directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.release import Progress

KIND = "llama2"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def directory(hf_directory, tmp_path) -> Path:
    """Return a copy of the directory of a model, which the test may change."""
    return Path(shutil.copytree(hf_directory(KIND), tmp_path / "hf"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def change_config(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | fields))


def there_and_back(directory: Path, **options: Any) -> tuple[Path, list[str]]:
    """Convert ``directory`` to Megatron and back; returns the new directory and what was reported on the way."""
    reports: list[str] = []
    out = directory.parent
    hf_to_megatron(directory, out / "megatron", progress=Progress(report=reports.append), **options)
    return megatron_to_hf(out / "megatron", out / "back", progress=Progress(report=reports.append), **options), reports


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# What config.json holds


# Which files hold the weights


def in_shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


@pytest.mark.parametrize("layout", ["single", "sharded", "before PyTorch 1.6"])
def test_pytorch_model_bin_is_converted(directory, layout):
    tensors = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    if layout == "sharded":
        files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for file, part in zip(files, in_shards(tensors), strict=True):
            torch.save(part, directory / file)
        weight_map = {name: file for file, part in zip(files, in_shards(tensors), strict=True) for name in part}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        zipped = layout == "single"
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    back, _ = there_and_back(directory)
    assert_equal(tensors_of(back), tensors)
    assert not list(back.glob("*.bin*"))


class Harmful:
    """Makes the directory ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_by_name(directory):
    (directory / "model.safetensors").unlink()
    torch.save({EMBEDDING: Harmful(directory.parent / "made")}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin was refused: .*posix.mkdir"):
        hf_to_megatron(directory, directory.parent / "out")
    assert not (directory.parent / "made").exists()


ESCAPES = ["../outside.safetensors", "/etc/hosts", "sub/model.safetensors", "..", "", "a\\b", 7]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_may_only_name_files_of_its_directory(directory, name, kind):
    shutil.copyfile(directory / "model.safetensors", directory.parent / "outside.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        hf_to_megatron(directory, directory.parent / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_a_directory_are_refused(directory, file):
    (directory / file).rename(directory.parent / "elsewhere")
    (directory / file).symlink_to("../elsewhere")
    message = rf"{file} is a symbolic link to .*elsewhere, outside of its directory: .* SELFDISTILL_FOLLOW_LINKS=1 if"
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(directory, directory.parent / "out")


def test_a_user_can_vouch_for_the_links_of_a_directory(hf_directory, directory, monkeypatch):
    links = directory.parent / "links"
    links.mkdir()
    (directory / "notes.txt").write_text("notes")
    for file in directory.iterdir():
        (links / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"config\.json is a symbolic link to .*/hf/config\.json, outside of"):
        hf_to_megatron(links, directory.parent / "out")
    monkeypatch.setenv("SELFDISTILL_FOLLOW_LINKS", "1")
    back, _ = there_and_back(links)
    assert_equal(tensors_of(back), tensors_of(hf_directory(KIND)))
    assert (back / "notes.txt").read_text() == "notes"


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(directory):
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a named pipe, expected a file"):
        hf_to_megatron(directory, directory.parent / "out")


def test_links_of_the_hubs_cache_are_followed(directory):
    expected = tensors_of(directory)
    blobs, snapshot = (
        directory.parent / "models--a--b" / "blobs",
        directory.parent / "models--a--b" / "snapshots" / "1234",
    )
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    hf_to_megatron(snapshot, directory.parent / "megatron")
    assert_equal(tensors_of(megatron_to_hf(directory.parent / "megatron", directory.parent / "back")), expected)


# Which files are copied


def test_everything_but_weights_is_copied_both_ways(directory):
    files = {
        "tekken.json": "{}",
        "README.md": "a card",
        "modeling_own.py": "x = 1",
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "tokenization_own.py": "y = 2",
    }
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
    assert copied == {"config.json", "generation_config.json", "model.safetensors", *files}
    assert [line for line in reports if line.startswith("notes.txt is not copied: it is a symbolic link")]


# Types


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_types_that_differ_between_tensors_come_back(directory):
    wide = {"norm", "lm_head"}
    tensors = {n: t if any(part in n for part in wide) else t.bfloat16() for n, t in tensors_of(directory).items()}
    save(directory, tensors)
    back, reports = there_and_back(directory)
    assert_equal(tensors_of(back), tensors)
    assert config_of(back)["dtype"] == "bfloat16"
    assert not [line for line in reports if "become" in line]


def test_types_that_differ_within_one_tensor_of_megatrons_are_widened_and_reported(directory):
    narrow = "model.layers.2.self_attn.k_proj.weight"
    tensors = tensors_of(directory) | {narrow: tensors_of(directory)[narrow].bfloat16()}
    save(directory, tensors)
    back, reports = there_and_back(directory)
    assert torch.equal(tensors_of(back)[narrow], tensors[narrow].float())
    assert f"{narrow} become float32, like the other tensors of their keys" in reports


def test_half_precision_is_recorded_as_such(directory):
    save(directory, {name: tensor.half() for name, tensor in tensors_of(directory).items()})
    back, _ = there_and_back(directory)
    args = read_common(directory.parent / "megatron" / "release")["args"]
    assert (args.fp16, args.bf16, args.params_dtype) == (True, False, torch.float16)
    assert config_of(back)["dtype"] == "float16"
    assert {tensor.dtype for tensor in tensors_of(back).values()} == {torch.float16}


# Fields of config.json


def with_config(kind: str, hf_directory: Any, tmp_path: Path, **fields: Any) -> Path:
    directory = Path(shutil.copytree(hf_directory(kind), tmp_path / "hf"))
    change_config(directory, **fields)
    return directory


@pytest.mark.parametrize("kind, fields", [("qwen2", {"attention_bias": True}), ("llama2", {"hidden_act": "swish"})])
def test_fields_that_change_nothing_are_kept(hf_directory, tmp_path, kind, fields):
    back, _ = there_and_back(with_config(kind, hf_directory, tmp_path, **fields))
    assert config_of(back).items() >= fields.items()
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf_directory(kind))
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


# The first mistake
