# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The student's and the teacher's prompt as token ids, through the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_selfdistill.data.data_files import is_hub_name
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import MissingChatTemplateError

DEFAULT_TEACHER_TEMPLATE = """\
{problem}

Here is a solution to this problem, for your eyes only:

{solution}

Use it only as a hint. Reason in your own words, step by step, from the problem itself to the final answer, as
if you had not seen the solution. Never mention that a solution was given."""


@dataclass(frozen=True)
class PromptTemplates:
    """The wording of both prompts.

    ``{problem}`` and ``{solution}`` are slots; a text that fills a slot may contain braces.  All other braces are plain
    text, except where they look like a slot: write ``{{name}}`` for a literal ``{name}``.

    Raises: ValueError for a missing or an unknown slot.
    """

    teacher: str = DEFAULT_TEACHER_TEMPLATE
    """Wording of the last user message for the teacher, with both slots."""
    student: str = "{problem}"
    """Wording of the last user message for the student, with the slot ``{problem}`` only."""
    system_prompt: str | None = None
    """System message of both prompts, for conversations without one."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as ``enable_thinking``."""

    def __post_init__(self) -> None:
        for name, needed in (("teacher", {"problem", "solution"}), ("student", {"problem"})):
            slots = {match[2] for match in _SLOT.finditer(getattr(self, name)) if match[2]}
            wanted = " and ".join(f"{{{slot}}}" for slot in sorted(needed))
            if missing := sorted(needed - slots):
                raise ValueError(
                    f"The {name}'s template: expected the slots {wanted}, but {{{missing[0]}}} is missing."
                )
            if unknown := sorted(slots - needed):
                raise ValueError(
                    f"The {name}'s template: expected only the slots {wanted}, got {{{unknown[0]}}}; "
                    f"write {{{{{unknown[0]}}}}} for literal braces."
                )


class Tokenizer(Protocol):
    """The tokenizer of a run; `load_tokenizer` returns one."""

    name: str
    """Path or hub name of the tokenizer."""
    vocab_size: int
    """Largest token id, added tokens included, plus one."""
    eos_id: int | None
    """Id of the end-of-sequence token; None where the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with special tokens only where ``text`` spells them."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``; a fast tokenizer uses all cores."""
        return [self.encode(text) for text in texts]

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""

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


class PromptBuilder:
    """The builder of both prompts of a problem, which end in the same generation prompt."""

    def __init__(self, tokenizer: Tokenizer, templates: PromptTemplates, show_contents: bool = True) -> None:
        """Let errors quote the problems and the chat template's own errors if ``show_contents`` is set."""
        self.tokenizer, self.templates, self.show_contents = tokenizer, templates, show_contents

    def student_text(self, problem: Problem, reply: Mapping[str, Any] | None = None) -> str:
        """Return the student's prompt as text.

        With ``reply``, the text is the conversation with the reply at its end and without a generation prompt.
        """
        messages = self._student_messages(problem)
        return self._render([*messages, *([dict(reply)] if reply else [])], problem, reply is None)

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the token ids of the student's conversation, up to and including the generation prompt."""
        return self.tokenizer.encode(self._render(self._student_messages(problem), problem, True))

    def teacher_prompt(self, problem: Problem, solution: str | None = None) -> list[int]:
        """Return the token ids of the teacher's conversation, up to and including the generation prompt.

        The last user message has the teacher's wording.  ``solution`` replaces the problem's solution: a shortened
        solution, or one that the model has found itself.
        """
        return self.tokenizer.encode(self._render(self._teacher_messages(problem, solution), problem, True))

    def prompt_pair(self, problem: Problem, solution: str | None = None) -> tuple[list[int], list[int]]:
        """Return the student's and the teacher's prompt as token ids, which end in the same generation prompt.

        The generation prompt is the text that ``add_generation_prompt`` adds.  Its first token may also have the end of
        the message before it (a question mark and two line feeds can be one token); that token belongs to the message,
        and may differ.

        Raises: ValueError if student and teacher would not begin their response after the same token ids.
        """
        texts = self.pair_texts(problem, solution)
        return self.pair_of(problem, texts, self.tokenizer.encode_batch(texts))

    def pair_texts(self, problem: Problem, solution: str | None = None) -> tuple[str, str, str, str]:
        """Return the texts for `pair_of`: of the student without and with generation prompt, then of the teacher."""
        student, teacher = self._student_messages(problem), self._teacher_messages(problem, solution)
        before, prompt, teacher_before, teacher_prompt = (
            self._render(messages, problem, flag) for messages in (student, teacher) for flag in (False, True)
        )
        return before, prompt, teacher_before, teacher_prompt

    def pair_of(self, problem: Problem, texts: Sequence[str], ids: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Return `prompt_pair` of a problem whose ``texts`` from `pair_texts` are encoded as ``ids``."""
        student, teacher = _split_prompt(texts[:2], ids[:2]), _split_prompt(texts[2:], ids[2:])
        skip = 1 if student.joins_message or teacher.joins_message else 0
        if student.generation_text != teacher.generation_text or student.tail[skip:] != teacher.tail[skip:]:
            decode = self.tokenizer.decode
            got = (
                f"{decode(student.tail)!r} {student.tail} for the student and {decode(teacher.tail)!r} "
                f"{teacher.tail} for the teacher"
            )
            raise ValueError(
                f"{problem.location}: expected both contexts to end in the same generation prompt, got "
                f"{got if self.show_contents else 'different ones'}; the chat template depends on the text of the "
                "message: change data.teacher_template, or fix the generation prompt with data.chat_template_kwargs."
            )
        return student.ids, teacher.ids

    def _student_messages(self, problem: Problem) -> list[dict[str, Any]]:
        return self._reworded(problem, self.templates.student, {})

    def _teacher_messages(self, problem: Problem, solution: str | None) -> list[dict[str, Any]]:
        solution = problem.solution if solution is None else solution
        return self._reworded(problem, self.templates.teacher, {"solution": solution})

    def _reworded(self, problem: Problem, template: str, slots: Mapping[str, str]) -> list[dict[str, Any]]:
        messages = [dict(message) for message in problem.messages]
        last = _last_user_message(problem)
        texts = {"problem": messages[last]["content"], **slots}
        # One pass over the template: a slot within a filled text stays as it is.
        messages[last]["content"] = _SLOT.sub(
            lambda match: texts[match[2]] if match[2] else f"{{{match[1]}}}", template
        )
        if self.templates.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.templates.system_prompt})
        return messages

    def _render(self, messages: list[dict[str, Any]], problem: Problem, add_generation_prompt: bool) -> str:
        kwargs = dict(self.templates.chat_template_kwargs)
        if problem.tools:
            kwargs["tools"] = list(problem.tools)
        try:
            return self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        except MissingChatTemplateError:
            raise
        except Exception as error:  # a template is a program and can raise any exception
            if not self.show_contents:
                message = f"{problem.location}: the chat template refused the conversation ({type(error).__name__})"
                raise ValueError(message) from None
            raise ValueError(f"{problem.location}: the chat template refused the conversation: {error}") from error


def last_user_text(problem: Problem) -> str:
    """Return the text of the problem's last user message, which fills the slot ``{problem}``."""
    text: str = problem.messages[_last_user_message(problem)]["content"]
    return text


def _last_user_message(problem: Problem) -> int:
    return max(index for index, message in enumerate(problem.messages) if message["role"] == "user")


def load_tokenizer(path: str | Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Load a Hugging Face tokenizer (directory or hub name), or a SentencePiece ``.model`` file or its directory.

    ``chat_template`` is a Jinja template that replaces the tokenizer's; for base models, which know no roles,
    ``{% for m in messages %}{{ m.content }}{% endfor %}`` is plain text.  ``trust_remote_code`` lets the tokenizer run
    the Python code in its directory (auto_map).

    Raises: FileNotFoundError or ValueError if there is no tokenizer at ``path``.
    """
    path = tokenizer_place(path)
    if str(path).endswith(".model"):
        return SentencePieceTokenizer(path, chat_template=chat_template)
    return HuggingFaceTokenizer(path, chat_template=chat_template, trust_remote_code=trust_remote_code)


def tokenizer_place(path: str | Path) -> str | Path:
    """Return the place of the tokenizer at ``path``: a directory, a SentencePiece ``.model`` file, or a hub name.

    Nothing is imported or read.  Raises: FileNotFoundError or ValueError if there can be no tokenizer.
    """
    if not Path(path).exists() and not str(path).endswith(".model") and not is_hub_name(path):
        raise FileNotFoundError(
            f"Tokenizer: expected {_TOKENIZERS}, got {path}, which does not exist; correct data.tokenizer."
        )
    path = Path(path) if Path(path).exists() else path
    if isinstance(path, Path) and path.is_dir():
        is_hf = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        if not is_hf and (path / "tokenizer.model").exists():
            path = path / "tokenizer.model"
    if str(path).endswith(".model"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"Tokenizer: expected a SentencePiece model file, got {path}, which is no file.")
    elif isinstance(path, Path) and not path.is_dir():
        raise ValueError(f"Tokenizer: expected {_TOKENIZERS}, got {path}, another kind of file; name its directory.")
    return path


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
        self.name = str(path)
        # Ids may have holes (len() is then too small for an embedding table).
        self.vocab_size: int = max(len(self._tokenizer), 1 + max(self._tokenizer.get_vocab().values()))
        self.eos_id: int | None = self._tokenizer.eos_token_id

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""
        return {index: token for token, index in self._tokenizer.get_vocab().items()}

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
        self._chat_template = chat_template
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
        self._control = {self._sp.id_to_piece(i): i for i in range(self.vocab_size) if self._sp.is_control(i)}
        # Longest first: where one piece is the beginning of another, the longer piece is meant.
        pieces = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(pieces)})" if pieces else "(?!)")

    def tokens(self) -> dict[int, str]:
        """Return id -> token of the whole vocabulary, added tokens included."""
        return {index: self._sp.id_to_piece(index) for index in range(self.vocab_size)}

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

        if self._chat_template is None:
            raise MissingChatTemplateError(self.name)
        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self._chat_template,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **kwargs},
        )
        text: str = rendered[0]
        return text


@dataclass(frozen=True)
class _SplitPrompt:
    """A prompt's ids and their tail, which follows the ids of the same prompt without generation prompt."""

    ids: list[int]
    tail: list[int]
    generation_text: str
    joins_message: bool
    """Whether the tail begins within the message, so that one token spans the boundary."""


def _split_prompt(texts: Sequence[str], encoded: Sequence[list[int]]) -> _SplitPrompt:
    (before, whole), (before_ids, ids), equal = texts, encoded, 0
    while equal < min(len(before_ids), len(ids)) and before_ids[equal] == ids[equal]:
        equal += 1
    generation_text = whole[len(before) :] if whole.startswith(before) else whole
    return _SplitPrompt(ids, ids[equal:], generation_text, joins_message=equal < len(before_ids))


_TOKENIZERS = "a directory with tokenizer.json, a SentencePiece .model file or a hub name"

# `{{name}}` is a literal `{name}` (group 1), `{name}` a slot (group 2); all other braces are text.
_SLOT = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
