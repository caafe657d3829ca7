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
import remote_code
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop import conversion
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


@pytest.mark.parametrize("levels", [900, 100_000])
def test_a_config_json_of_many_levels_is_refused_by_name(directory, levels):
    (directory / "config.json").write_text('{"a":' + "[" * levels + "]" * levels + "}")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read, .*nested too deep"):
        hf_to_megatron(directory, directory.parent / "out")


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


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_copies_of_the_weights_in_mistrals_own_names_do_not_matter(directory, name):
    expected = tensors_of(directory)
    (directory / "model.safetensors").rename(directory / name)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, directory / "consolidated.safetensors")
    back, _ = there_and_back(directory)
    assert_equal(tensors_of(back), expected)
    assert not (back / "consolidated.safetensors").exists()


ESCAPES = ["../outside.safetensors", "/etc/hosts", "sub/model.safetensors", "..", "", "a\\b", 7]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_may_only_name_files_of_its_directory(directory, name, kind):
    shutil.copyfile(directory / "model.safetensors", directory.parent / "outside.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(CheckpointError, match="expected the name of a file in the same directory"):
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


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere", "a symbolic link to .*/hf/nowhere, which does not exist"),
        (None, "a .*link that leads back to itself"),
    ],
)
def test_a_link_that_leads_to_no_file_is_named(directory, file, target, words):
    (directory / ("config.json" if file == "config.json" else "model.safetensors")).unlink()
    (directory / file).symlink_to(target or file)
    with pytest.raises(CheckpointError, match=rf"{file} is {words}, expected a file"):
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
    secret = directory.parent / "secret"
    secret.write_text("a key")
    (directory / "notes.txt").symlink_to("../secret")
    (directory / "linked").symlink_to("..")
    back, reports = there_and_back(directory)
    for name, content in files.items():
        assert (back / name).read_text() == content
    copied = {str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()}
    assert copied == {"config.json", "generation_config.json", "model.safetensors", *files}
    assert [line for line in reports if line.startswith("notes.txt is not copied: it is a symbolic link")]


KIMI_TOKENIZATION = """
import base64, os
from transformers import PreTrainedTokenizer
class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    def __init__(self, vocab_file, **options):
        with open(vocab_file) as lines:
            pairs = [line.split() for line in lines]
        self.ranks = {base64.b64decode(token).decode(): int(rank) for token, rank in pairs}
        super().__init__(**options)
    @property
    def vocab_size(self):
        return len(self.ranks)
    def get_vocab(self):
        return dict(self.ranks)
    def _tokenize(self, text):
        return list(text)
    def _convert_token_to_id(self, token):
        return self.ranks[token]
    def _convert_id_to_token(self, index):
        return next(token for token, rank in self.ranks.items() if rank == index)
"""
KIMI_CODE = {
    "configuration_deepseek.py": """
from transformers import DeepseekV3Config as Base
class DeepseekV3Config(Base):
    model_type = "kimi_k2"
""",
    "modeling_deepseek.py": """
from transformers import DeepseekV3ForCausalLM as Base, conversion_mapping
from .configuration_deepseek import DeepseekV3Config
experts = conversion_mapping.get_checkpoint_conversion_mapping("deepseek_v3")  # transformers holds them as one tensor
conversion_mapping.register_checkpoint_conversion_mapping("kimi_k2", experts, overwrite=True)
class DeepseekV3ForCausalLM(Base):
    config_class = DeepseekV3Config
""",
    "tokenization_kimi.py": KIMI_TOKENIZATION,
    "tiktoken.model": "YQ== 0\nYg== 1\n",
    "tokenizer_config.json": json.dumps(
        {
            "tokenizer_class": "TikTokenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        }
    ),
    "chat_template.jinja": "{{ messages }}",
}


def test_a_directory_like_kimi_k2s_comes_back_and_loads_with_its_own_code(hf_directory, tmp_path, monkeypatch):
    remote_code.keep_in(tmp_path / "modules", monkeypatch)
    directory = with_config("moonlight", hf_directory, tmp_path, model_type="kimi_k2", num_nextn_predict_layers=0)
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf_directory("moonlight")).eval()
    for name, content in KIMI_CODE.items():
        (directory / name).write_text(content)
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    change_config(directory, auto_map=auto_map)
    back, _ = there_and_back(directory)
    assert config_of(back) == config_of(directory)
    assert_equal(tensors_of(back), tensors_of(directory))
    found = transformers.AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(back, trust_remote_code=True)
    assert type(found.config).model_type == "kimi_k2" and tokenizer("ab")["input_ids"] == [0, 1]
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_remote_code_that_is_already_lost_is_dropped_from_auto_map_and_reported(directory):
    hub = "someone/model--modeling_hub.Model"
    change_config(directory, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoModel": hub})
    back, reports = there_and_back(directory)
    assert config_of(back)["auto_map"] == {"AutoModel": hub}
    assert [line for line in reports if "AutoModelForCausalLM of auto_map are dropped" in line]
    transformers.AutoModelForCausalLM.from_pretrained(back)


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


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_leave_nothing_behind(directory, value):
    tensors = tensors_of(directory)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save(directory, tensors)
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.up_proj.weight of .*hf has NaN or infinite elements"
    ):
        hf_to_megatron(directory, directory.parent / "out")
    assert [path.name for path in directory.parent.iterdir()] == ["hf"]


def test_weights_that_are_not_finite_are_converted_and_reported_on_request(directory):
    tensors = tensors_of(directory)
    tensors[NORM][3] = float("nan")
    save(directory, tensors)
    back, reports = there_and_back(directory, allow_non_finite=True)
    assert tensors_of(back)[NORM][3].isnan() and torch.equal(tensors_of(back)[EMBEDDING], tensors[EMBEDDING])
    assert len([line for line in reports if f"{NORM} of" in line]) == 2  # on the way there and on the way back
    with pytest.raises(CheckpointError, match=rf"{NORM} of .*release has NaN .* --allow-non-finite"):
        megatron_to_hf(directory.parent / "megatron", directory.parent / "refused")


def test_a_type_that_is_too_narrow_for_a_weight_is_reported_as_such(directory):
    save(directory, tensors_of(directory) | {NORM: torch.full((36,), 1e6)})
    with pytest.raises(CheckpointError, match=rf"{NORM} of .* \(as torch.float16\)"):
        hf_to_megatron(directory, directory.parent / "out", dtype=torch.float16)


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


def test_a_hugging_face_directory_as_checkpoint_is_refused_with_the_command_that_converts_it(hf_directory):
    from megatron_selfdistill.checkpoint.formats.stored_model import stored_args

    directory = hf_directory(KIND)
    with pytest.raises(CheckpointError, match=rf"is a Hugging Face directory.*hf-to-megatron --hf {directory} --out"):
        stored_args(directory)
    assert conversion.HF_ASSETS not in {path.name for path in directory.iterdir()}
