# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Texts without a model: a tokenizer whose tokens are characters, and the rank grid of a single rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_selfdistill.data.tokenizer import Tokenizer

STOP = ord("$")
ONE_RANK = SimpleNamespace(
    **{"world_size": 1, "dp_rank": 0, "dp_size": 1, "replica_rank": 0, "replica_size": 1, "is_first_of_replica": True},
    **dict.fromkeys(("dp_group", "tp_group", "cp_group", "pp_group")),
    device=torch.device("cpu"),
)


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


class Characters(Tokenizer):
    """A tokenizer with one token per character; a chat is its contents, and a colon opens an answer."""

    name, vocab_size, eos_id = "characters", 128, STOP

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return text_of(ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the contents of all messages, and a colon where an answer follows."""
        return "".join(message["content"] for message in messages) + ":" * add_generation_prompt
