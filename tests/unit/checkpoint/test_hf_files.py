# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Folders as they are published: other kinds of weights, files and types; and names that lead out of a folder."""

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

from megatron_selfdistill.checkpoint import conversion
from megatron_selfdistill.checkpoint.conversion import Progress, hf_to_megatron, megatron_to_hf
from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled
from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.errors import CheckpointError

KIND = "llama2"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def folder(hf_folder, tmp_path) -> Path:
    """A copy of a converted model's folder, to be changed."""
    return Path(shutil.copytree(hf_folder(KIND), tmp_path / "hf"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def there_and_back(folder: Path, **options: Any) -> tuple[Path, list[str]]:
    """Convert ``folder`` to Megatron and back; returns the new folder and what was reported on the way."""
    said: list[str] = []
    out = folder.parent
    hf_to_megatron(folder, out / "megatron", progress=Progress(say=said.append), **options)
    return megatron_to_hf(out / "megatron", out / "back", progress=Progress(say=said.append), **options), said


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Which files hold the weights


def in_shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


@pytest.mark.parametrize("layout", ["single", "sharded", "before PyTorch 1.6"])
def test_pytorch_model_bin_is_converted(folder, layout):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    if layout == "sharded":
        files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for file, part in zip(files, in_shards(tensors), strict=True):
            torch.save(part, folder / file)
        weight_map = {name: file for file, part in zip(files, in_shards(tensors), strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        zipped = layout == "single"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    back, _ = there_and_back(folder)
    assert_equal(tensors_of(back), tensors)
    assert not list(back.glob("*.bin*"))


class Harmful:
    """Makes the folder ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    torch.save({EMBEDDING: Harmful(folder.parent / "made")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not read: .*posix.mkdir"):
        hf_to_megatron(folder, folder.parent / "out")
    assert not (folder.parent / "made").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_copies_of_the_weights_in_mistrals_own_names_do_not_matter(folder, name):
    expected = tensors_of(folder)
    (folder / "model.safetensors").rename(folder / name)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    back, _ = there_and_back(folder)
    assert_equal(tensors_of(back), expected)
    assert not (back / "consolidated.safetensors").exists()


ESCAPES = ["../outside.safetensors", "/etc/hosts", "sub/model.safetensors", "..", "", "a\\b", 7]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_may_only_name_files_of_its_folder(folder, name, kind):
    shutil.copyfile(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(CheckpointError, match="expected the name of a file in the same folder"):
        hf_to_megatron(folder, folder.parent / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_a_folder_are_refused(folder, file):
    (folder / file).rename(folder.parent / "elsewhere")
    (folder / file).symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=rf"{file} is a symbolic link to .*elsewhere, outside of its folder"):
        hf_to_megatron(folder, folder.parent / "out")


def test_links_of_the_hubs_cache_are_followed(folder):
    expected = tensors_of(folder)
    blobs, snapshot = folder.parent / "models--a--b" / "blobs", folder.parent / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    hf_to_megatron(snapshot, folder.parent / "megatron")
    assert_equal(tensors_of(megatron_to_hf(folder.parent / "megatron", folder.parent / "back")), expected)


# Which files are copied


def test_everything_but_weights_is_copied_both_ways(folder):
    files = {
        "tekken.json": "{}",
        "README.md": "a card",
        "modeling_own.py": "x = 1",
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "tokenization_own.py": "y = 2",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    for name in ("optimizer.pt", "model.onnx", ".hidden", "hf_quant_config.json", "rust_model.ot.h5"):
        (folder / name).write_bytes(b"0")
    secret = folder.parent / "secret"
    secret.write_text("a key")
    (folder / "notes.txt").symlink_to("../secret")
    (folder / "linked").symlink_to("..")
    back, said = there_and_back(folder)
    for name, content in files.items():
        assert (back / name).read_text() == content
    copied = {str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()}
    assert copied == {"config.json", "generation_config.json", "model.safetensors", *files}
    assert [line for line in said if line.startswith("notes.txt is not copied: it is a symbolic link")]


MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_modules(tmp_path, monkeypatch) -> None:
    """Let transformers copy remote code to a folder of this test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_model_with_remote_code_loads_when_it_comes_back(folder, own_modules):
    from tokenizers import Tokenizer, models

    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "tokenization_own.py").write_text(TOKENIZATION)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written |= {
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        "tokenizer_class": "OwnTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(folder, auto_map=auto_map, model_type="own_llama")
    back, _ = there_and_back(folder)
    found = transformers.AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True).eval()
    loaded = transformers.AutoTokenizer.from_pretrained(back, trust_remote_code=True)
    assert type(found).__name__ == "OwnForCausalLM" and type(loaded).__name__ == "OwnTokenizer"
    assert loaded("b")["input_ids"] == [1]
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_remote_code_that_is_already_lost_is_dropped_from_auto_map_and_reported(folder):
    hub = "someone/model--modeling_hub.Model"
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoModel": hub})
    back, said = there_and_back(folder)
    assert config_of(back)["auto_map"] == {"AutoModel": hub}
    assert [line for line in said if "AutoModelForCausalLM of auto_map are dropped" in line]
    transformers.AutoModelForCausalLM.from_pretrained(back)


# Types


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_types_that_differ_between_tensors_come_back(folder):
    wide = {"norm", "lm_head"}
    tensors = {n: t if any(part in n for part in wide) else t.bfloat16() for n, t in tensors_of(folder).items()}
    save(folder, tensors)
    back, said = there_and_back(folder)
    assert_equal(tensors_of(back), tensors)
    assert config_of(back)["dtype"] == "bfloat16"
    assert not [line for line in said if "become" in line]


def test_types_that_differ_within_one_tensor_of_megatrons_are_widened_and_reported(folder):
    narrow = "model.layers.2.self_attn.k_proj.weight"
    tensors = tensors_of(folder) | {narrow: tensors_of(folder)[narrow].bfloat16()}
    save(folder, tensors)
    back, said = there_and_back(folder)
    assert torch.equal(tensors_of(back)[narrow], tensors[narrow].float())
    assert f"{narrow} become float32, like the tensors that they are stored with" in said


def test_half_precision_is_recorded_as_such(folder):
    save(folder, {name: tensor.half() for name, tensor in tensors_of(folder).items()})
    back, _ = there_and_back(folder)
    args = load_pickled(folder.parent / "megatron" / "release" / "common.pt")["args"]
    assert (args.fp16, args.bf16, args.params_dtype) == (True, False, torch.float16)
    assert config_of(back)["dtype"] == "float16"
    assert {tensor.dtype for tensor in tensors_of(back).values()} == {torch.float16}


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_leave_nothing_behind(folder, value):
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save(folder, tensors)
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.up_proj.weight of .*hf has NaN or infinite elements"
    ):
        hf_to_megatron(folder, folder.parent / "out")
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_weights_that_are_not_finite_are_converted_and_reported_on_request(folder):
    tensors = tensors_of(folder)
    tensors[NORM][3] = float("nan")
    save(folder, tensors)
    back, said = there_and_back(folder, allow_non_finite=True)
    assert tensors_of(back)[NORM][3].isnan() and torch.equal(tensors_of(back)[EMBEDDING], tensors[EMBEDDING])
    assert len([line for line in said if f"{NORM} of" in line]) == 2  # on the way there and on the way back
    with pytest.raises(CheckpointError, match=rf"{NORM} of .*release has NaN .* --allow-non-finite"):
        megatron_to_hf(folder.parent / "megatron", folder.parent / "refused")


def test_a_type_that_is_too_narrow_for_a_weight_is_reported_as_such(folder):
    save(folder, tensors_of(folder) | {NORM: torch.full((36,), 1e6)})
    with pytest.raises(CheckpointError, match=rf"{NORM} of .* \(as torch.float16\)"):
        hf_to_megatron(folder, folder.parent / "out", dtype=torch.float16)


# Fields of config.json


def with_config(kind: str, hf_folder: Any, tmp_path: Path, **fields: Any) -> Path:
    folder = Path(shutil.copytree(hf_folder(kind), tmp_path / "hf"))
    change_config(folder, **fields)
    return folder


@pytest.mark.parametrize("field, value", [("scoring_func", "softmax"), ("topk_method", "greedy")])
def test_another_router_than_deepseek_v3s_is_refused(hf_folder, tmp_path, field, value):
    folder = with_config("deepseek_v3", hf_folder, tmp_path, **{field: value})
    with pytest.raises(ConfigError, match=f"{field}='{value}'"):
        hf_to_megatron(folder, tmp_path / "out")


@pytest.mark.parametrize("kind, fields", [("qwen2", {"attention_bias": True}), ("llama2", {"hidden_act": "swish"})])
def test_fields_that_change_nothing_are_kept(hf_folder, tmp_path, kind, fields):
    back, _ = there_and_back(with_config(kind, hf_folder, tmp_path, **fields))
    assert config_of(back).items() >= fields.items()
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf_folder(kind))
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


# The first mistake


def test_a_hugging_face_folder_as_checkpoint_is_told_how_to_be_converted(hf_folder):
    from megatron_selfdistill.checkpoint.formats.stored_model import stored_args

    folder = hf_folder(KIND)
    with pytest.raises(CheckpointError, match=rf"is a Hugging Face folder.*hf-to-megatron --hf {folder} --out"):
        stored_args(folder)
    assert conversion.COMPANIONS not in {path.name for path in folder.iterdir()}
