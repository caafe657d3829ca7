# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The text of a response, cut into what each of its tokens adds."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.data.prompts import Tokenizer

_LONGEST = 4  # bytes of a character, and so tokens


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return what each token adds to the text: joined, they are ``tokenizer.decode(ids)`` wherever its bytes are text.

    A token's own text is not ``decode([id])``: leading spaces and characters of several tokens depend on what comes
    before.  So each token is decoded behind the last whole character's tokens, a few at a time.
    """
    texts: list[str] = []
    context, done = 0, 0  # ids[context:done] are decoded with what follows them; ids[done:] have no text yet
    for end in range(1, len(ids) + 1):
        known, text = tokenizer.decode(ids[context:done]), tokenizer.decode(ids[context:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end - done < _LONGEST and end < len(ids):
            texts.append("")  # the character goes on in the next token
            continue
        texts.append(text[len(known) :])
        context, done = done, end
    return texts
