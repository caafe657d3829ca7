# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Problems that are sums, and responses to them in characters."""

from __future__ import annotations

import random

from characters import text_of
from made_methods import response_of

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.rollout.base import Request, Response


def answered(request: Request) -> Response:
    """Behind ``a+b:``, as the stream says: the sum after some steps, a wrong one, or one without an end."""
    a, b = text_of(request.prompt).rstrip(":").split("+")
    rng = random.Random(request.seed)
    text = "so\n" * rng.randrange(4) + str(int(a) + int(b) + (rng.random() < 0.3))
    cut = rng.random() < 0.2
    return response_of(text + ("" if cut else "$"), [-rng.random() for _ in range(len(text) + (not cut))])


def sums(count: int = 9) -> list[Problem]:
    return [
        Problem(f"p{a}", ({"role": "user", "content": f"{a}+8"},), "", str(a + 8), f"file.jsonl:{a}")
        for a in range(count)
    ]
