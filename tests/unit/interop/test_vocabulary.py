# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Another model's tokenizer is refused before anything else is read; the same one saved in other files is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hf_models
import pytest
import sentencepiece
from letters import LETTERS, save_tokenizer
from tokenizers import decoders
from transformers import AutoTokenizer

from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer, with_stored_tokenizer
from megatron_selfdistill.config import Config, from_mapping
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.conversion import hf_to_megatron


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Return a converted checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("vocabulary")
    hf_models.write("llama2", directory / "hf")
    save_tokenizer(directory / "hf")
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory / "megatron"


def config_of(checkpoint: Path, tokenizer: Path, **data: object) -> Config:
    run_dir = checkpoint.parent / "run"
    load = {"load": str(checkpoint)}
    return from_mapping({"data": {"tokenizer": str(tokenizer), **data}, "checkpoint": load, "run_dir": str(run_dir)})


def test_the_tokenizer_that_the_checkpoint_carries_is_taken_also_saved_again_in_another_order(checkpoint, tmp_path):
    require_same_tokenizer(config_of(checkpoint, checkpoint / "release" / "huggingface"))
    AutoTokenizer.from_pretrained(checkpoint.parent / "hf").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["decoder"] = json.loads(decoders.Fuse().__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert (tmp_path / "tokenizer.json").read_bytes() != (checkpoint.parent / "hf" / "tokenizer.json").read_bytes()
    require_same_tokenizer(config_of(checkpoint, tmp_path))


def test_a_run_without_a_tokenizer_takes_the_checkpoints_and_says_so_on_rank_0_alone(
    checkpoint, tmp_path, capsys, monkeypatch
):
    stored = checkpoint / "release" / "huggingface"
    for load in (checkpoint, checkpoint / "release"):
        config = from_mapping({"checkpoint": {"load": str(load)}})
        assert with_stored_tokenizer(config).data.tokenizer == str(stored)
        assert str(stored) in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert with_stored_tokenizer(config).data.tokenizer == str(stored)
    given, nothing = config_of(checkpoint, Path("mine")), from_mapping({"checkpoint": {"load": str(tmp_path)}})
    for config in (given, nothing, from_mapping({})):
        assert with_stored_tokenizer(config) == config
    assert capsys.readouterr().err == ""


OTHERS = {
    "smaller, of another model": ("_$hgfedcba"[:6], (), "token 2 is 'h' here and 'a' there"),
    "other added tokens": (LETTERS, ("<plan>",), "token 10 is '<plan>' here and '<think>' there"),
    "more added tokens": (LETTERS, ("<think>", "<plan>"), "token 11 is '<plan>' here and absent there"),
}


def test_another_tokenizer_is_refused_with_both_names_unless_it_is_allowed(checkpoint, tmp_path):
    for other, (letters, added, difference) in OTHERS.items():
        save_tokenizer(tmp_path / other, letters, added)
        with pytest.raises(ConfigError) as error:
            require_same_tokenizer(config_of(checkpoint, tmp_path / other))
        for named in (str(tmp_path / other), str(checkpoint / "release" / "huggingface"), difference):
            assert named in str(error.value)
        require_same_tokenizer(config_of(checkpoint, tmp_path / other, allow_other_tokenizer=True))


def test_a_checkpoint_without_tokenizer_says_nothing(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "megatron")
    for file in (tmp_path / "megatron" / "release" / "huggingface").glob("tokenizer*"):
        file.unlink()
    require_same_tokenizer(config_of(tmp_path / "megatron", save_tokenizer(tmp_path / "other", "_$xyz")))


def test_a_run_that_resumes_compares_with_what_its_own_directory_carries(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "release", tmp_path / "run" / "checkpoints" / "iter_0000003")
    shutil.move(tmp_path / "run" / "checkpoints" / "iter_0000003" / "huggingface", tmp_path / "run" / "huggingface")
    save_tokenizer(tmp_path / "other", "_$xyz")
    data = {"data": {"tokenizer": str(tmp_path / "other")}, "run_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=f"checkpoint's tokenizer in {tmp_path / 'run' / 'huggingface'}"):
        require_same_tokenizer(from_mapping(data))


# SentencePiece


def train_sentencepiece(file: Path, text: str) -> Path:
    (file.parent / "text.txt").write_text("\n".join([text] * 20))
    files = {"input": str(file.parent / "text.txt"), "model_prefix": str(file.with_suffix(""))}
    sentencepiece.SentencePieceTrainer.train(**files, vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    return file


def test_sentencepiece_files_are_compared_by_their_pieces(tmp_path):
    hf_models.write("llama2", tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model", "one two three and so on")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    copied = Path(shutil.copy(tmp_path / "hf" / "tokenizer.model", tmp_path / "mine.model"))
    require_same_tokenizer(config_of(tmp_path / "megatron", copied))
    other = train_sentencepiece(tmp_path / "other.model", "vier und fuenf und sechs")
    with pytest.raises(ConfigError, match="is not the checkpoint's tokenizer"):
        require_same_tokenizer(config_of(tmp_path / "megatron", other))
