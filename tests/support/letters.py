# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tokenizers with one token per letter."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "_$abcdefgh"


def save_tokenizer(directory: Path, letters: str = LETTERS, added: tuple[str, ...] = ("<think>",)) -> Path:
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", unk_token="_")
    fast.add_tokens(list(added))
    fast.save_pretrained(directory)
    return directory
