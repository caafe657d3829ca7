# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A response cut into its tokens' texts is still the response."""

from __future__ import annotations

import pytest

from megatron_selfdistill.data.pieces import pieces
from megatron_selfdistill.data.tokenizer import load_tokenizer

TEXT = "What is the  sum?\n\n héllo 你好 🙂🙂 the answer<|im_end|> is seven"


@pytest.mark.parametrize("directory", ["chat_directory", "sentencepiece_file"])
def test_the_pieces_joined_are_the_decoded_text(directory, request):
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    ids = tokenizer.encode(TEXT)
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "🙂" in found, "the last byte of a character brings the whole character"
    assert "" in found and not any("\ufffd" in piece for piece in found)
    assert any(piece.startswith(" ") for piece in found), "leading spaces stay with their token"


def test_bytes_that_are_no_text_are_decoded_a_few_at_a_time(chat_directory, monkeypatch):
    """A model gone wrong writes such responses, and a sample must not hold up the run."""
    tokenizer = load_tokenizer(chat_directory)
    first_byte = tokenizer.encode("🙂")[0]
    longest, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: longest.append(len(ids)) or decode(ids))
    assert set("".join(pieces([first_byte] * 200, tokenizer))) == {"\ufffd"}
    assert max(longest) <= 8


@pytest.mark.parametrize("directory", ["chat_directory", "sentencepiece_file"])
def test_a_response_cut_within_a_character_ends_in_a_replacement(directory, request):
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    ids = tokenizer.encode("so 🙂")[:-2]
    found = pieces(ids, tokenizer)
    assert "".join(found) == tokenizer.decode(ids) and "".join(found).startswith("so")
    assert pieces([], tokenizer) == []
