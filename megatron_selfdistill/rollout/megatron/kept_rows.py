# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The KV caches of finished responses, which the next turns of their episodes read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_selfdistill.rollout.base import Request


class KeptRow(NamedTuple):
    """One sequence of a KV cache."""

    tokens: list[int]
    """The n tokens that the model has read: a prompt, and its response without the last token."""
    memory: dict[int, tuple[Tensor, Tensor]]
    """Number of a layer -> its keys and values, ``[n, heads, channels]`` each."""


class KeptRows:
    """The caches of one rank for requests that continue earlier ones (`Request.episode`), as far as there is room.

    All ranks that share requests hold the same rows.  A request whose row is missing is read from its first token on.
    """

    def __init__(self) -> None:
        self.room = 0
        """The greatest number of tokens of all rows."""
        self._rows: dict[str, KeptRow] = {}
        self._owners: dict[str, int] = {}

    def begin(self, requests: Sequence[Request]) -> None:
        """Drop what belongs to episodes that none of a replica's ``requests`` continues."""
        names = {request.episode for request in requests}
        self._rows = {name: row for name, row in self._rows.items() if name in names}
        self._owners = {name: owner for name, owner in self._owners.items() if name in names}

    def owner(self, request: Request, index: int, cp_size: int) -> int:
        """Return the context-parallel rank that samples a request: all turns of an episode stay on one rank."""
        if request.episode is None:
            return index % cp_size
        return self._owners.setdefault(request.episode, index % cp_size)

    def has(self, request: Request) -> bool:
        """Return whether the rank has a row with the first tokens of the request's prompt."""
        row = self._rows.get(request.episode or "")
        return row is not None and request.prompt[: len(row.tokens)] == row.tokens != request.prompt

    def taken(self, request: Request) -> KeptRow:
        """Return the row of a request for which `has` is true, and drop it."""
        assert request.episode is not None, "only the requests of episodes have rows"
        return self._rows.pop(request.episode)

    def add(self, request: Request, row: KeptRow) -> None:
        """Keep ``row`` for the request that continues ``request``, if there is room."""
        assert request.episode is not None, "only the requests of episodes have rows"
        if sum(len(kept.tokens) for kept in self._rows.values()) + len(row.tokens) <= self.room:
            self._rows[request.episode] = row

    def clear(self) -> None:
        """Drop all rows: the weights change, or others need the memory."""
        self._rows.clear()
