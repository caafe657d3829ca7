# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The protocol of a tokenizer, the text of a chat template, and the texts of single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

RARE_LETTERS = "\U00010380\U00012000"
"""Letters of Ugaritic and of cuneiform, which are in a vocabulary of bytes only."""
_LONGEST = 4  # bytes, and thus tokens, of a character


class Tokenizer(Protocol):
    """The tokenizer of a run; `load_tokenizer` returns one."""

    name: str
    """Path or hub name of the tokenizer."""
    vocab_size: int
    """Largest token id, added tokens included, plus one."""
    eos_id: int | None
    """Id of the end-of-sequence token; None if the tokenizer has none."""
    unknown_id: int | None = None
    """Id of the token of all texts that the tokenizer cannot encode; None if it can encode every text."""
    chat_template: Any = None
    """The chat template: Jinja, or several templates by their names; None for none."""
    prefix: Sequence[int] = ()
    """Ids that the tokenizer itself writes before a text (BOS), and `encode` does not; () for none."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with special tokens only where ``text`` spells them."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``; a fast tokenizer uses all cores."""
        return [self.encode(text) for text in texts]

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""

    def special_tokens(self) -> Sequence[str]:
        """Return the tokens that ``skip_special_tokens`` leaves out."""
        return ()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``, for people and verifiers; the text must not be encoded again."""

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the messages as one string, by the chat template with the variables ``kwargs``."""

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Return ``encode(render_chat(...))``."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt, **kwargs))


def chat_template_text(template: str | None) -> str | None:
    """Return the Jinja text of ``data.chat_template``, which is the text itself or names its file; None for None.

    Raises: ValueError for another name, and for a text that writes nothing.
    """
    if template is None or "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"data.chat_template: expected a Jinja template or a file that holds one, got {template!r}")
    return Path(template).read_text(encoding="utf-8")


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
