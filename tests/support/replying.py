# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment that replies to any text, whose episodes have different lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem


class Replying:
    """An environment that decides by the sum of the character codes: a sum that 3 does not divide goes on."""

    def __init__(self, role: str = "user") -> None:
        self.role = role

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        total = sum(map(ord, said[-1]))
        number = (len(said) + 1) // 2
        return Reply(f"X{number}", self.role, f"X{number}!", float(total % 2 == 0), total % 3 == 0)


class Keyed(Replying):
    def __init__(self, password_env: str) -> None:
        super().__init__()
        self.password = os.environ[password_env]


NOT_CALLABLE = "a text"
