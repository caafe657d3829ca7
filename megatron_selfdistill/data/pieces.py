# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The text that each token of a response adds."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_selfdistill.data.tokenizer import Tokenizer

_LONGEST = 4  # bytes, and thus tokens, of a character


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text that each token adds; joined, the texts are ``tokenizer.decode(ids)`` where its bytes are text.

    The text of a token is not ``decode([id])``: leading spaces, and characters of several tokens, depend on the tokens
    before it.  Each token is therefore decoded together with the tokens of the last complete character.
    """
    texts: list[str] = []
    context, done = 0, 0  # ids[context:done] are decoded with the next tokens; ids[done:] have no text yet
    for end in range(1, len(ids) + 1):
        known, text = tokenizer.decode(ids[context:done]), tokenizer.decode(ids[context:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end - done < _LONGEST and end < len(ids):
            texts.append("")  # the character continues in the next token
            continue
        texts.append(text[len(known) :])
        context, done = done, end
    return texts
