# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tokenizer of a checkpoint: a run has the same token for every id."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.config import Config, DataConfig
from megatron_selfdistill.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.errors import ConfigError

_TOKENIZERS = "tokenizer.json tokenizer.model vocab.json vocab.txt tekken.json *.tiktoken tiktoken.model".split()


def require_same_tokenizer(config: Config) -> None:
    """Compare ``data.tokenizer`` with the tokenizer in the checkpoint from which the run resumes or starts.

    The function compares nothing where the checkpoint has no tokenizer, and with ``data.allow_other_tokenizer``.  It
    compares ids and tokens, including added tokens, so a tokenizer that was saved again in other files is equal.
    Each rank reads for itself; a process group is not needed.

    Raises: ConfigError that names both tokenizers and their first difference, or the tokenizer that cannot be loaded.
    """
    data, resumes = config.data, config.run_dir and config.checkpoint.resume
    newest = directory.latest(Path(config.run_dir) / "checkpoints") if resumes else None
    path = newest or config.checkpoint.load
    stored = None if path is None else tokenizer_directory(Path(path))
    difference = None if data.allow_other_tokenizer else difference_to(stored, data)
    if difference is not None:
        raise ConfigError(
            f"data.tokenizer={data.tokenizer} is not the checkpoint's tokenizer in {stored}: "
            f"{difference}; set data.tokenizer={stored}, or data.allow_other_tokenizer=true if you mean this"
        )


def difference_to(stored: Path | None, data: DataConfig) -> str | None:
    """Return the `first_difference` of ``data.tokenizer`` and the tokenizer ``stored``; None if one of them is missing.

    Raises: ConfigError for a tokenizer that cannot be loaded.
    """
    if stored is None or data.tokenizer is None or Path(data.tokenizer).resolve() == stored.resolve():
        return None
    try:
        pair = (load_tokenizer(path, trust_remote_code=data.trust_remote_code) for path in (data.tokenizer, stored))
        return first_difference(*pair)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def first_difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """Return the lowest id with different tokens in two tokenizers, as a text; None if the tokenizers agree.

    A SentencePiece file has no added tokens: against a tokenizer of another kind only the ids of the file count.
    """
    left, right = ours.tokens(), theirs.tokens()
    ids = {*left, *right}
    kinds = [isinstance(tokenizer, SentencePieceTokenizer) for tokenizer in (ours, theirs)]
    if kinds[0] != kinds[1]:
        ids = set(left if kinds[0] else right)
    for index in sorted(ids):
        if left.get(index) != right.get(index):
            return f"token {index} is {_shown(left, index)} here and {_shown(right, index)} there"
    return None


def _shown(tokens: Mapping[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "absent"


def tokenizer_directory(path: Path) -> Path | None:
    """Return the directory with the tokenizer of a checkpoint or a Hugging Face directory; None if there is none."""
    assets = path if directory.is_hugging_face(path) else directory.hf_assets_of(directory.tracked(path) or path)
    return assets if assets is not None and any(any(assets.glob(pattern)) for pattern in _TOKENIZERS) else None


def with_stored_tokenizer(config: Config) -> Config:
    """Return ``config`` with the tokenizer of ``checkpoint.load`` if ``data.tokenizer`` is null; rank 0 says so."""
    load = config.checkpoint.load
    found = tokenizer_directory(Path(load)) if load is not None and config.data.tokenizer is None else None
    if found is None:
        return config
    if os.environ.get("RANK", "0") == "0":
        print(f"data.tokenizer={found}, the tokenizer of checkpoint.load", file=sys.stderr, flush=True)
    return replace(config, data=replace(config.data, tokenizer=str(found)))
