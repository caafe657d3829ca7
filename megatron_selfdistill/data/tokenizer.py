# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tokenizers: the protocol, and the tokenizers of Hugging Face and SentencePiece behind it.

A child process tries a chat template before a run renders the template itself.  A chat template is a program that comes
with a tokenizer.  Its sandbox keeps it from files and from the network, but not from multiplying a text by ten billion
or from nesting loops, which would take all memory or all time of a node.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_selfdistill.data.records import is_hub_name
from megatron_selfdistill.errors import MissingChatTemplateError

_RARE_LETTERS = "\U00010380\U00012000"
"""Letters of Ugaritic and of cuneiform, which are in a vocabulary of bytes only."""
_TOKENIZERS = "a directory with tokenizer.json, a SentencePiece .model file or a hub name"
_LONGEST = 4  # bytes, and thus tokens, of a character
LIMIT_S = 60.0
"""The time for a trial, in seconds, with the import of transformers from a slow file system."""
LIMIT_BYTES = 2 << 30
"""The memory that a trial may take beside the program's own, in bytes; only Linux limits it."""
_OUT_OF_MEMORY = 3
_CHILD = """
import json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

template, variables, limit, status = json.load(sys.stdin)
if sys.platform == "linux":
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
try:
    conversation = [{"role": "user", "content": "What is 1 + 1?"}]
    render_jinja_template([conversation], chat_template=template, add_generation_prompt=True, **variables)
except MemoryError:
    sys.exit(status)
except Exception:
    pass  # the template may refuse this conversation; the run renders its own and reports errors
"""


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


def chat_template_text(template: str | None) -> str | None:
    """Return the Jinja text of ``data.chat_template``, which is the text itself or names its file; None for None.

    Raises: ValueError for another name, and for a text that writes nothing.
    """
    if template is None or "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"data.chat_template: expected a Jinja template or a file that holds one, got {template!r}")
    return Path(template).read_text(encoding="utf-8")


def tokenizer_place(path: str | Path) -> str | Path:
    """Return the place of the tokenizer at ``path``: a directory, a SentencePiece ``.model`` file, or a hub name.

    Nothing is imported or read.  Raises: FileNotFoundError if there can be no tokenizer.
    """
    place = Path(path)
    if is_hub_name(path) and not str(path).endswith(".model"):
        return path
    if not (place.is_dir() or (place.is_file() and place.suffix == ".model")):
        raise FileNotFoundError(f"Tokenizer: expected {_TOKENIZERS}, got {path}; correct data.tokenizer.")
    is_hf = any((place / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return place if is_hf or not (place / "tokenizer.model").exists() else place / "tokenizer.model"


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
            raise ValueError(f"Tokenizer: expected {_TOKENIZERS}, got {path}: {reason}") from error
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
        special = {
            "bos": self._sp.bos_id(),
            "eos": self._sp.eos_id(),
            "unk": self._sp.unk_id(),
            "pad": self._sp.pad_id(),
        }
        self._special_tokens = {f"{name}_token": self._sp.id_to_piece(i) for name, i in special.items() if i >= 0}
        self.eos_id: int | None = special["eos"] if special["eos"] >= 0 else None
        self.unknown_id = special["unk"] if special["unk"] in self._sp.encode(_RARE_LETTERS) else None
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


def try_chat_template(name: str, template: Any, variables: Mapping[str, Any]) -> None:
    """Render a chat template once in a child process of limited memory and time.

    ``name``: the tokenizer of the template, for the message; ``template``: Jinja, other values are not tried;
    ``variables``: the special tokens that the template may write.  A template whose text cannot grow beyond that of the
    conversation needs no trial.

    Raises: ValueError if the template exceeds a limit.
    """
    if not isinstance(template, str) or _grows_with_the_messages_only(template):
        return
    texts = {key: value for key, value in variables.items() if isinstance(value, str)}
    if exceeded := _exceeded_limit(template, json.dumps(texts)):
        raise ValueError(
            f"{name}: the chat template {exceeded} for a conversation of one short message; use another tokenizer, or "
            "give a data.chat_template"
        )


@functools.cache
def _exceeded_limit(template: str, variables: str) -> str | None:
    """Return which limit the template exceeds, or None; ``variables`` are an object of JSON."""
    given = json.dumps([template, json.loads(variables), LIMIT_BYTES, _OUT_OF_MEMORY])
    child = [sys.executable, "-c", _CHILD]
    try:
        status = subprocess.run(child, input=given, text=True, capture_output=True, timeout=LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_S:g} s"
    if status != _OUT_OF_MEMORY and status >= 0:
        return None
    return f"took more than {LIMIT_BYTES >> 30} GiB of memory"


def _grows_with_the_messages_only(template: str) -> bool:
    """Return whether the template writes each message a bounded number of times: it has one level of loops."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        parsed = Environment().parse(template)
    except TemplateSyntaxError:  # extensions of transformers are not known here
        return False
    loops = list(parsed.find_all(nodes.For))
    nested = any(loop is not other and other in loop.find_all(nodes.For) for loop in loops for other in loops)
    bounded = (
        *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem),
        *(nodes.For, nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
        *(nodes.Add, nodes.Concat, nodes.Test, nodes.Slice),
    )
    return (
        not nested
        and all(
            isinstance(node, bounded) or (isinstance(node, nodes.Filter) and node.name in ("trim", "upper", "lower"))
            for node in parsed.find_all(nodes.Node)
        )
        and all(isinstance(loop.iter, nodes.Name) and not loop.recursive for loop in loops)
    )
