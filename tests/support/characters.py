# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Texts without a model: a tokenizer whose tokens are characters, and the grid of a run of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from megatron_selfdistill.data.prompts import Tokenizer

STOP = ord("$")
ONE_RANK = SimpleNamespace(
    world_size=1,
    dp_rank=0,
    dp_size=1,
    **{f"{axis}_{what}": n for axis in ("tp", "cp", "pp") for what, n in (("rank", 0), ("size", 1))},
)


class Characters(Tokenizer):
    """One token per character; a chat is its contents and, for an answer, a colon."""

    name, vocab_size, eos_id = "characters", 128, STOP

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        return "".join(message["content"] for message in messages) + ":" * add_generation_prompt
