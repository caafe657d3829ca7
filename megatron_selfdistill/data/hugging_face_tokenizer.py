# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A tokenizer of ``transformers``.

A child process tries a chat template before a run renders the template itself.  A chat template is a program that comes
with a tokenizer.  Its sandbox keeps it from files and from the network, but not from multiplying a text by ten billion
or from nesting loops, which would take all memory or all time of a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.data.tokenizer import RARE_LETTERS, Tokenizer
from megatron_selfdistill.data.tried_template import try_chat_template
from megatron_selfdistill.errors import MissingChatTemplateError

_PROBE = "[x] a  b\n1 + 23 é"
TOKENIZERS = "a directory with tokenizer.json, a SentencePiece .model file or a hub name"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of ``transformers``."""

    def __init__(self, path: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            # False, since transformers asks on the terminal whether to run the code if there is no value.
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, mistral_format=False
            )
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
        self._require_text_of_file(Path(path))
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self.chat_template = self._tokenizer.chat_template
        self.name = str(path)
        # Ids may have holes (len() is then too small for an embedding table).
        self.vocab_size: int = max(len(self._tokenizer), 1 + max(self._tokenizer.get_vocab().values()))
        self.eos_id: int | None = self._tokenizer.eos_token_id
        # Tokenizers of bytes name an unknown token, too, which no text becomes.
        unknown = self._tokenizer.unk_token_id
        self.unknown_id = unknown if unknown in self.encode(RARE_LETTERS) else None
        own, plain = list(self._tokenizer("x")["input_ids"]), self.encode("x")
        starts = [at for at in range(len(own)) if own[at : at + len(plain)] == plain]
        self.prefix = own[: starts[0]] if starts else ()
        try_chat_template(self.name, self._tokenizer.chat_template, self._tokenizer.special_tokens_map)

    def _require_text_of_file(self, directory: Path) -> None:
        """Raise ValueError where transformers reads a text otherwise than ``tokenizer.json`` says or Mistral meant.

        Transformers 5.19 loses the spaces of DeepSeek's tokenizers that name the class of Llama.
        """
        from tokenizers import Tokenizer as TokenizerOfFile

        file, backend = directory / "tokenizer.json", getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not file.is_file() or "fix_mistral_regex" in self._tokenizer.init_kwargs:
            return
        if getattr(backend, "fix_mistral_regex", None) is False and "{1,3}" in str(backend.pre_tokenizer):
            raise ValueError(
                f"Tokenizer: {file} splits text otherwise than Mistral's models were trained with: write "
                '"fix_mistral_regex": true into tokenizer_config.json, or false to keep this split'
            )
        of_file = TokenizerOfFile.from_file(str(file))
        expected = of_file.decode(of_file.encode(_PROBE, add_special_tokens=False).ids, skip_special_tokens=False)
        if (got := self.decode(self.encode(_PROBE))) != expected:
            raise ValueError(
                f"Tokenizer: this version of transformers reads {got!r} where {file} reads {expected!r}: install "
                'another version, or set "tokenizer_class" to "PreTrainedTokenizerFast" in tokenizer_config.json'
            )

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
        """Return the messages as one string, by the chat template with the variables ``kwargs``.

        Raises: MissingChatTemplateError if there is no chat template.
        """
        if not self._tokenizer.chat_template:
            raise MissingChatTemplateError(self.name)
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
        return text
