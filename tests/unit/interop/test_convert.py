# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hugging Face -> Megatron -> Hugging Face is the identity; the command converts and describes."""

from __future__ import annotations

import json
import shutil
import signal
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from hf_contents import assert_same_tensors, config_of, tensors_of
from safetensors.torch import save_file
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.checkpoint.external import load_weights
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.commands.given_model import find_model
from megatron_selfdistill.config import ParallelConfig, load
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop import conversion
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf, write_prompt_settings
from megatron_selfdistill.interop.convert_command import main
from megatron_selfdistill.interop.describe import describe, true_vocab_size
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.interop.hf.mapping import family_of, text_config

KINDS = list(hf_models.CONFIGS)
REBUILT = ("llama3", "qwen3_window", "gpt_oss")
"""The kinds whose config.json `make test` rebuilds, one of each kind of rotary base, attention and expert."""
NAMED_OTHERWISE = {kind: hf_models.logits_bound(kind) for kind in ("phi3", "qwen3_5_moe")}
"""Kinds that return without config.json as an earlier family, which computes the same with other tensors."""


@combinations(kind=KINDS, quick={"kind": REBUILT}, strength=1)
def test_there_and_back_is_the_identity_and_without_the_original_config_transformers_computes_the_same(
    hf_directory, tmp_path, kind
):
    import transformers

    hf = hf_directory(kind)
    release = hf_to_megatron(hf, tmp_path / "megatron")
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(hf, back)
    assert config_of(hf) == config_of(back)
    assert (hf / "generation_config.json").read_text() == (back / "generation_config.json").read_text()

    shutil.rmtree(release / HF_ASSETS)
    rebuilt = megatron_to_hf(tmp_path / "megatron", tmp_path / "rebuilt")
    if kind not in NAMED_OTHERWISE:
        assert_same_tensors(hf, rebuilt)
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (hf, rebuilt))
    if kind not in NAMED_OTHERWISE:  # the same call on the same memory has equal bits; files are aligned differently
        after.load_state_dict(before.state_dict(), assign=True)
    with torch.no_grad():
        difference = (before(tokens).logits - after(tokens).logits).abs().max()
    assert difference <= NAMED_OTHERWISE.get(kind, 0.0)


def test_shards_are_bounded_and_load(hf_directory, tmp_path):
    hf = hf_directory("qwen3")
    hf_to_megatron(hf, tmp_path / "megatron")
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size=30_000)
    shards = sorted(back.glob("*.safetensors"))
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) <= 30_000 + 10_000
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in shards} == {(tmp_path / "new").stat().st_mode}
    assert_same_tensors(hf, back)
    hf_to_megatron(back, tmp_path / "again")  # an index and many files are read, too
    assert_same_tensors(hf, megatron_to_hf(tmp_path / "again", tmp_path / "smaller", max_shard_size=10_000))


def test_a_type_is_taken_by_all_weights_but_the_expert_bias(hf_directory, tmp_path):
    hf_to_megatron(hf_directory("deepseek_v3"), tmp_path / "megatron", dtype=torch.bfloat16)
    tensors = tensors_of(megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))
    for name, original in tensors_of(hf_directory("deepseek_v3")).items():
        expected = original if name.endswith("e_score_correction_bias") else original.bfloat16()
        assert tensors[name].dtype == expected.dtype and torch.equal(tensors[name], expected)
    assert config_of(tmp_path / "back")["dtype"] == "bfloat16"


def with_fp8(hf: Path, out: Path) -> dict[str, torch.Tensor]:
    """``hf`` with block-scaled FP8 weights in its MLPs; returns these dequantised."""
    tensors, dequantised = {}, {}
    for name, tensor in tensors_of(hf).items():
        if ".experts." not in name or not name.endswith("proj.weight"):
            tensors[name] = tensor.bfloat16() if not name.endswith("_bias") else tensor
            continue
        rows, columns = (-(-size // 16) for size in tensor.shape)
        scales = 0.01 + torch.rand(rows, columns)
        wide = scales.repeat_interleave(16, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
        tensors[name] = (tensor / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        dequantised[name] = (tensors[name].double() * wide.double()).bfloat16()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (out / "config.json").write_text(json.dumps(config_of(hf) | {"quantization_config": quantization}))
    return dequantised


def test_fp8_weights_come_back_dequantised(hf_directory, tmp_path):
    expected = with_fp8(hf_directory("deepseek_v3"), tmp_path / "fp8")
    hf_to_megatron(tmp_path / "fp8", tmp_path / "megatron")
    tensors = tensors_of(megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))
    assert expected
    for name, values in expected.items():
        assert tensors[name].dtype == torch.bfloat16 and torch.equal(tensors[name], values), name
    assert "quantization_config" not in config_of(tmp_path / "back")
    assert not [name for name in tensors if name.endswith("_scale_inv")]


# The command


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put back the handler of SIGTERM, which the command replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_command_converts_and_describes_and_takes_a_run_directory_as_a_checkpoint(
    hf_directory, tmp_path, capsys, handlers
):
    run, hf = tmp_path / "run", str(hf_directory("mixtral"))
    assert main(["hf-to-megatron", "--hf", hf, "--out", str(run / "checkpoints"), "--dtype", "bf16"]) == 0
    assert f"checkpoint.load={run / 'checkpoints'}\n" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    for part in ("MixtralForCausalLM", "101 true rows, 128 with padding", "bfloat16", f"{run}/checkpoints/release"):
        assert part in shown
    assert main(["megatron-to-hf", "--megatron", str(run), "--out", str(tmp_path / "back")]) == 0
    assert tensors_of(tmp_path / "back").keys() == tensors_of(hf_directory("mixtral")).keys()
    prechecks.require_start(load([f"checkpoint.load={run}"]))
    assert find_model(None, run, None)["path"] == str(run / "checkpoints" / "release")


MISTAKEN = {
    "hf-to-megatron --hf Qwen/Qwen3-0.6B --out out": "hf download Qwen/Qwen3-0.6B",
    "hf-to-megatron --hf hf --out full": "full exists",
    "megatron-to-hf --megatron empty --out full": "full exists",
    "inspect full/nope": "full/nope does not exist",
}


def test_a_mistaken_name_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, named in MISTAKEN.items():
        assert main(arguments.split()) == 2
        message = capsys.readouterr().err
        assert named in message and len(message.splitlines()) == 1
    assert len(list(tmp_path.rglob("*"))) == 4


# A text model beside a vision tower


def write(directory: Path, tied: bool = False) -> Any:
    """Save a random Mistral 3 with a text model of `hf_models`; return it."""
    import transformers

    text = hf_models.hf_config("ministral3").to_dict() | {"pad_token_id": None}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Mistral3ForConditionalGeneration(config).eval()
        hf_models.randomise(model)
    model.save_pretrained(directory)
    return model


def loaded_logits(directory: Path) -> Tensor:
    config = config_of(directory / "hf")
    model = family_of(config).model_config(config)
    chunks, grid = models.build(model, ParallelConfig())
    load_weights(directory / "megatron", chunks, model.vocab_size)
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)])
def test_text_and_vision_return_whole_and_the_text_model_has_transformers_logits(ranks, tmp_path, tied):
    original = write(tmp_path / "hf", tied)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert config_of(tmp_path / "hf") == config_of(tmp_path / "back")
    assert any(name.startswith("vision_tower.") for name in tensors_of(tmp_path / "back"))
    assert describe(tmp_path / "hf")["num_layers"] == describe(tmp_path / "megatron" / "release")["num_layers"]
    (logits,) = ranks.run(loaded_logits, tmp_path, world_size=1)
    assert (logits - hf_models.hf_logits(original, hf_models.SEQUENCES)).abs().max() <= 1e-4


def text_checkpoint(hf: Path, out: Path) -> Path:
    """Write a checkpoint of the text model alone, such as a run saves; return it."""
    text, prefix = out / "text", "language_model."
    text.mkdir(parents=True)
    tensors = {n.removeprefix(prefix): t for n, t in tensors_of(hf).items() if n.startswith(prefix)}
    save_file(tensors, text / "model.safetensors", {"format": "pt"})
    (text / "config.json").write_text(json.dumps(dict(text_config(config_of(hf)))))
    shutil.rmtree(hf_to_megatron(text, out / "megatron") / HF_ASSETS)
    return out / "megatron"


def test_the_checkpoint_of_a_run_takes_the_vision_tower_from_the_original_directory(tmp_path):
    write(tmp_path / "hf")
    trained = text_checkpoint(tmp_path / "hf", tmp_path / "run")
    megatron_to_hf(trained, tmp_path / "back", hf_config=tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    (tmp_path / "assets").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "assets")
    with pytest.raises(CheckpointError, match="has no weights"):
        megatron_to_hf(trained, tmp_path / "none", hf_config=tmp_path / "assets")
    shutil.copytree(tmp_path / "assets", trained / "release" / HF_ASSETS)
    with pytest.raises(CheckpointError, match=r"has no vision_tower\.\* .*--hf-config"):
        megatron_to_hf(trained, tmp_path / "none")
    assert not (tmp_path / "none").exists() and open_weights(trained).passthrough == {}
    tensors = tensors_of(tmp_path / "hf") | {"audio_tower.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"audio_tower\.weight is unexpected"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")


# The number of rows of a vocabulary without padding


def stored(vocab_size: int | None, padded: int | None, tp_size: int = 1) -> Namespace:
    return Namespace(vocab_size=vocab_size, padded_vocab_size=padded, tensor_model_parallel_size=tp_size)


FOUND = [
    (stored(1000, 1024), 990, 1024, 1000),  # rows that no token has
    (stored(None, 1024), 1000, 1024, 1000),
    (stored(None, 2048, tp_size=8), 1100, 2048, 1100),
    (stored(None, None), 1000, 1000, 1000),
    (stored(None, 1024), None, 1024, 1024),
]
CONTRADICTIONS = [(stored(1000, 1024), 1001, 1024), (stored(1000, 1024), None, 999)]
CONTRADICTIONS += [(stored(None, None), 1000, 900), (stored(None, None), 1000, 1536)]


def test_arguments_then_tokenizer_then_rows_decide_and_a_contradiction_is_refused():
    for *given, expected in FOUND:
        assert true_vocab_size(*given) == expected, given
    for given in CONTRADICTIONS:
        with pytest.raises(CheckpointError, match="the true vocabulary is unclear"):
            true_vocab_size(*given)


# The prompts of the run whose checkpoint is converted


def test_the_template_of_the_run_goes_before_that_of_the_model_and_what_no_file_can_hold_is_named(
    tmp_path, monkeypatch
):
    run, out = tmp_path / "run", tmp_path / "out"
    for directory, content in ((run, "that of the run"), (out, "that of the model")):
        directory.mkdir()
        (directory / "chat_template.jinja").write_text(content)
    views = {"student": {"generation_prompt": "A:"}, "teacher": {"system_prompt": "Unseen."}}
    data = {"chat_template": "template.jinja", "student_template": "Q: {problem}", "views": views}
    saved = {"configuration": {"data": data}}
    monkeypatch.setattr(conversion, "read_saved_run", lambda path: SavedRun(path, {}, {}, saved))
    lines: list[str] = []
    write_prompt_settings(run / "checkpoints" / "iter_0000001", out, lines.append)
    assert (out / "chat_template.jinja").read_text() == "that of the run"
    for named in ("data.chat_template", "data.student_template=Q: {problem}", "student.generation_prompt=A:"):
        assert any(named in line for line in lines)
    assert not any("Unseen" in line for line in lines)
