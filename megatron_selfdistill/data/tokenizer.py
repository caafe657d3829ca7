# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tokenizers: the protocol, and the tokenizers of Hugging Face and SentencePiece behind it.

A child process tries a chat template before a run renders the template itself.  A chat template is a program that comes
with a tokenizer.  Its sandbox keeps it from files and from the network, but not from multiplying a text by ten billion
or from nesting loops, which would take all memory or all time of a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_selfdistill.data.tried_template import try_chat_template
from megatron_selfdistill.errors import MissingChatTemplateError

_RARE_LETTERS = "\U00010380\U00012000"
"""Letters of Ugaritic and of cuneiform, which are in a vocabulary of bytes only."""
TOKENIZERS = "a directory with tokenizer.json, a SentencePiece .model file or a hub name"
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
        """Return the conversation as one string, by the chat template with the variables ``kwargs``."""

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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of ``transformers``."""

    def __init__(self, path: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            # False, since transformers asks on the terminal whether to run the code if there is no value.
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except Exception as error:  # tokenizers raises a plain Exception, and remote code any exception
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not trust_remote_code and "trust_remote_code" in str(error):
                reason = (
                    "its auto_map names Python code that the tokenizer needs; read that code, and set "
                    "data.trust_remote_code=true to run it"
                )
            elif not isinstance(path, Path):
                reason = f"there is no such directory here, and it could not be loaded as a hub name ({reason})"
            raise ValueError(f"Tokenizer: expected {TOKENIZERS}, got {path}: {reason}") from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self.chat_template = self._tokenizer.chat_template
        self.name = str(path)
        # Ids may have holes (len() is then too small for an embedding table).
        self.vocab_size: int = max(len(self._tokenizer), 1 + max(self._tokenizer.get_vocab().values()))
        self.eos_id: int | None = self._tokenizer.eos_token_id
        # Tokenizers of bytes name an unknown token, too, which no text becomes.
        unknown = self._tokenizer.unk_token_id
        self.unknown_id = unknown if unknown in self.encode(_RARE_LETTERS) else None
        own, plain = list(self._tokenizer("x")["input_ids"]), self.encode("x")
        starts = [at for at in range(len(own)) if own[at : at + len(plain)] == plain]
        self.prefix = own[: starts[0]] if starts else ()
        try_chat_template(self.name, self._tokenizer.chat_template, self._tokenizer.special_tokens_map)

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""
        return {index: token for token, index in self._tokenizer.get_vocab().items()}

    def special_tokens(self) -> Sequence[str]:
        """Return the tokens that ``skip_special_tokens`` leaves out."""
        added = self._tokenizer.added_tokens_decoder.values()
        return [*self._tokenizer.all_special_tokens, *(token.content for token in added if token.special)]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with special tokens only where ``text`` spells them."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed on all cores."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return [list(ids) for ids in self._tokenizer(list(texts), **options)["input_ids"]]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``, for people and verifiers."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the conversation as one string, by the chat template with the variables ``kwargs``.

        Raises: MissingChatTemplateError if there is no chat template.
        """
        if not self._tokenizer.chat_template:
            raise MissingChatTemplateError(self.name)
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
        return text


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
