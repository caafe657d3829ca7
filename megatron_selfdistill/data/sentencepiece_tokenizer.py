# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A SentencePiece model as a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.data.tokenizer import RARE_LETTERS, Tokenizer
from megatron_selfdistill.data.tried_template import try_chat_template
from megatron_selfdistill.errors import MissingChatTemplateError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, read by the ``sentencepiece`` library, with the chat templates of ``transformers``.

    The classes of ``transformers`` for ``.model`` files convert or post-process the model, and then differ from the
    encoding that the model was trained with (the prefix space, byte pieces).  Here the encoding of a text is exactly
    ``sp.encode(text)``.  Only control pieces such as ``<s>``, which that call never yields, become their ids where the
    text spells them; the parts between them are encoded one by one.
    """

    def __init__(self, path: str | Path, *, chat_template: str | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._sp = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"Tokenizer: expected a SentencePiece model, got {path}: {error}") from error
        self.chat_template = chat_template
        self.name = str(path)
        self.vocab_size: int = self._sp.get_piece_size()
        special = {name: getattr(self._sp, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
        self._special_tokens = {f"{name}_token": self._sp.id_to_piece(i) for name, i in special.items() if i >= 0}
        self.eos_id: int | None = special["eos"] if special["eos"] >= 0 else None
        self.unknown_id = special["unk"] if special["unk"] in self._sp.encode(RARE_LETTERS) else None
        try_chat_template(self.name, chat_template, self._special_tokens)
        self._control = {self._sp.id_to_piece(i): i for i in range(self.vocab_size) if self._sp.is_control(i)}
        # Longest first: where one piece is the beginning of another, the longer piece is meant.
        pieces = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(pieces)})" if pieces else "(?!)")

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""
        return {index: self._sp.id_to_piece(index) for index in range(self.vocab_size)}

    def special_tokens(self) -> Sequence[str]:
        """Return the tokens that ``skip_special_tokens`` leaves out."""
        return list(self._control)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with special tokens only where ``text`` spells them."""
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids.extend(self._sp.encode(part))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``, for people and verifiers."""
        parts: list[str] = []
        stretch: list[int] = []
        for token in ids:
            if self._sp.is_control(int(token)):
                parts.append(self._sp.decode(stretch))
                stretch = []
                if not skip_special_tokens:
                    parts.append(self._sp.id_to_piece(int(token)))
            else:
                stretch.append(int(token))
        return "".join([*parts, self._sp.decode(stretch)])

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the conversation as one string, by the chat template with the variables ``kwargs``.

        Raises: MissingChatTemplateError if there is no chat template.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise MissingChatTemplateError(self.name)
        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **kwargs},
        )
        text: str = rendered[0]
        return text
