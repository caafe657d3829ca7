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


def test_the_tokenizer_that_the_checkpoint_carries_is_taken(checkpoint):
    require_same_tokenizer(config_of(checkpoint, checkpoint / "release" / "huggingface"))
    require_same_tokenizer(config_of(checkpoint, checkpoint.parent / "hf"))


def test_a_run_without_a_tokenizer_takes_the_checkpoints_and_says_so_on_rank_0_alone(checkpoint, capsys, monkeypatch):
    stored = checkpoint / "release" / "huggingface"
    for load in (checkpoint, checkpoint / "release"):
        config = from_mapping({"checkpoint": {"load": str(load)}})
        assert with_stored_tokenizer(config).data.tokenizer == str(stored)
        assert capsys.readouterr().err == f"data.tokenizer={stored}, the tokenizer of checkpoint.load\n"
    monkeypatch.setenv("RANK", "1")
    assert with_stored_tokenizer(config).data.tokenizer == str(stored) and capsys.readouterr().err == ""


def test_a_tokenizer_that_is_set_stays_and_a_checkpoint_without_one_gives_none(checkpoint, tmp_path, capsys):
    given = config_of(checkpoint, Path("mine"))
    nothing = from_mapping({"checkpoint": {"load": str(tmp_path)}})
    assert with_stored_tokenizer(given) is given and with_stored_tokenizer(nothing) is nothing
    assert with_stored_tokenizer(from_mapping({})) == from_mapping({}) and capsys.readouterr().err == ""


def test_the_same_tokenizer_saved_again_in_another_order_with_other_fields_is_taken(checkpoint, tmp_path):
    AutoTokenizer.from_pretrained(checkpoint.parent / "hf").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["decoder"] = json.loads(decoders.Fuse().__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert (tmp_path / "tokenizer.json").read_bytes() != (checkpoint.parent / "hf" / "tokenizer.json").read_bytes()
    require_same_tokenizer(config_of(checkpoint, tmp_path))


OTHERS = {
    "smaller, of another model": ("_$hgfedcba"[:6], (), "token 2 is 'h' here and 'a' there"),
    "other added tokens": (LETTERS, ("<plan>",), "token 10 is '<plan>' here and '<think>' there"),
    "more added tokens": (LETTERS, ("<think>", "<plan>"), "token 11 is '<plan>' here and absent there"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_tokenizer_is_refused_with_both_names_unless_it_is_allowed(checkpoint, tmp_path, other):
    letters, added, difference = OTHERS[other]
    save_tokenizer(tmp_path, letters, added)
    stored = checkpoint / "release" / "huggingface"
    message = (
        f"data.tokenizer={tmp_path} is not the checkpoint's tokenizer in {stored}: {difference}; "
        f"set data.tokenizer={stored}, or data.allow_other_tokenizer=true if you mean this"
    )
    with pytest.raises(ConfigError) as error:
        require_same_tokenizer(config_of(checkpoint, tmp_path))
    assert str(error.value) == message
    require_same_tokenizer(config_of(checkpoint, tmp_path, allow_other_tokenizer=True))


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
    sentencepiece.SentencePieceTrainer.train(
        input=str(file.parent / "text.txt"),
        model_prefix=str(file.with_suffix("")),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
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
