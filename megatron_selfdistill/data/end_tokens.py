# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tokens that end a response: those of the tokenizer, of the files of the model's directory, and of the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.data.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
FILES = (GENERATION_CONFIG, "config.json")
"""The files of a model's directory that name the tokens at which its responses end, as ``eos_token_id``."""
_SAID, _NEXT = "Yes.", "And then?"


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response."""

    ids: tuple[int, ...]
    """Their ids.  The first one is the token that the chat template writes after a reply, if it writes any of them."""
    about: str
    """A line for the log with each token, its id and who names it."""
    reply_end: int | None
    """The token that the chat template writes after a reply; None if it writes none of them."""


def end_tokens(
    tokenizer: Tokenizer, places: Iterable[str | Path], own: Sequence[int], variables: Mapping[str, Any]
) -> EndTokens:
    """Return the union of the tokenizer's end of sequence, the ends that the files of ``places`` name, and ``own``.

    ``places``: directories of the model, ``.model`` files or hub names.  ``own``: ``rollout.stop_token_ids``.
    ``variables``: those of the chat template.
    Raises: ValueError if there is no end at all, and for a file that is not the JSON of such a file.
    """
    named: dict[int, list[str]] = {} if tokenizer.eos_id is None else {tokenizer.eos_id: ["tokenizer"]}
    for place in places:
        for file in FILES:
            for token in stated_ends(place, file):
                named.setdefault(token, []).append(file)
    for token in own:
        named.setdefault(token, []).append("rollout.stop_token_ids")
    known = [token for token in named if token < tokenizer.vocab_size]
    if not known:
        raise ValueError(
            f"{tokenizer.name}: expected an end of sequence in the tokenizer, {' or '.join(FILES)}, got none: name the "
            "token in rollout.stop_token_ids, or no response would ever end"
        )
    shown = [_shown(token, named[token], tokenizer) for token in named]
    last = reply_end(tokenizer, known, variables)
    ids = tuple(sorted(known, key=lambda token: token != last))  # the sort is stable
    return EndTokens(ids, f"a response ends at {', '.join(shown)}", last)


def _shown(token: int, names: Sequence[str], tokenizer: Tokenizer) -> str:
    by = f"{token}: {', '.join(dict.fromkeys(names))}"
    if token >= tokenizer.vocab_size:
        return f"no token of the tokenizer ({by})"
    is_meant = names[0] not in FILES or tokenizer.decode([token]) in tokenizer.special_tokens()
    return f"{tokenizer.decode([token])!r} ({by}{'' if is_meant else '; warning: an ordinary token'})"


def stated_ends(place: str | Path, file: str) -> list[int]:
    """Return the ``eos_token_id`` of a file of a model, also that in its ``text_config``.

    The result is empty if there is no such file or no such field.  ``place``: as for `end_tokens`.
    Raises: ValueError for a file without a JSON object.
    """
    path = _file(place, file)
    if path is None:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    parts = [content, content.get("text_config")] if isinstance(content, dict) else []
    values = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    found = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(one for one in found if isinstance(one, int) and not isinstance(one, bool)))


def _file(place: str | Path, file: str) -> Path | None:
    path = Path(place)
    if path.exists():
        found = (path if path.is_dir() else path.parent) / file
        return found if found.is_file() else None
    from transformers.utils import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    name = cached_file(str(place), file, **options)
    return None if name is None else Path(name)


def reply_end(tokenizer: Tokenizer, ends: Sequence[int], variables: Mapping[str, Any]) -> int | None:
    """Return the first of ``ends`` that the chat template writes after a reply; None if it writes none of them.

    Some templates (GLM-4.5) write nothing after the last reply: the mark of the user's next message ends a reply.
    """
    spoken = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _SAID}]
    for messages in (spoken, [*spoken, {"role": "user", "content": _NEXT}]):
        try:
            text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
        except Exception:  # a template is a program, and the run renders its own messages and reports errors
            return None
        _, said, rest = text.rpartition(_SAID)
        found = next((token for token in tokenizer.encode(rest.partition(_NEXT)[0]) if said and token in ends), None)
        if found is not None:
            return found
    return None
