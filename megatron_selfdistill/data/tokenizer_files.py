# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tokenizer of a directory, of a file or of a hub name."""

from __future__ import annotations

from pathlib import Path

from megatron_selfdistill.data.hugging_face_tokenizer import TOKENIZERS, HuggingFaceTokenizer
from megatron_selfdistill.data.records import is_hub_name
from megatron_selfdistill.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_selfdistill.data.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Load a Hugging Face tokenizer (directory or hub name), or a SentencePiece ``.model`` file or its directory.

    ``chat_template`` is a Jinja template that replaces the tokenizer's; for base models, which know no roles,
    ``{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}`` is plain text.  ``trust_remote_code`` lets
    the tokenizer run the Python code in its directory (auto_map).

    Raises: FileNotFoundError or ValueError if there is no tokenizer at ``path``.
    """
    path = tokenizer_place(path)
    if str(path).endswith(".model"):
        return SentencePieceTokenizer(path, chat_template=chat_template)
    return HuggingFaceTokenizer(path, chat_template=chat_template, trust_remote_code=trust_remote_code)


def tokenizer_place(path: str | Path) -> str | Path:
    """Return the place of the tokenizer at ``path``: a directory, a SentencePiece ``.model`` file, or a hub name.

    Nothing is imported or read.  Raises: FileNotFoundError if there can be no tokenizer.
    """
    place = Path(path)
    if is_hub_name(path) and not str(path).endswith(".model"):
        return path
    if not (place.is_dir() or (place.is_file() and place.suffix == ".model")):
        raise FileNotFoundError(f"Tokenizer: expected {TOKENIZERS}, got {path}; correct data.tokenizer.")
    is_hf = any((place / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return place if is_hf or not (place / "tokenizer.model").exists() else place / "tokenizer.model"
