# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What tests of samplers ask of responses: whose they are, where they end, and whether they were drawn as told."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import Response

T = TypeVar("T")


def own(grid: Any, everything: list[T]) -> list[T]:
    """What this rank's replica asks for, where the replicas take their requests in turns."""
    return everything[grid.dp_rank :: grid.dp_size]


def tokens(responses: Sequence[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


def cut_at(text: list[int], stops: Sequence[int]) -> tuple[list[int], str]:
    """``text`` up to the first of ``stops``, which stays, and the reason that it ends there."""
    for i, token in enumerate(text):
        if token in stops:
            return text[: i + 1], "stop"
    return text, "length"


def stops_of(texts: Sequence[list[int]]) -> tuple[int, int]:
    """Two tokens that end most of these texts, at different lengths, and two or three of them never."""
    for stops in combinations(sorted({token for text in texts for token in text}), 2):
        cut = [cut_at(text, stops) for text in texts]
        lengths, reasons = {len(text) for text, _ in cut}, [reason for _, reason in cut]
        if 2 <= reasons.count("length") <= 3 and len(lengths) >= 4:
            return stops
    raise AssertionError("these texts end all alike; change the prompts")


def chi_square_p_value(drawn: Tensor, probs: Tensor) -> float:
    """Of the counts of the tokens ``drawn`` under ``probs``; tokens of expectation below 5 share one bin."""
    probs = probs.double()
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0, "a token without probability was drawn"
    expected = probs * len(drawn)
    large = expected >= 5
    bins = [(counts[large], expected[large]), (counts[~large].sum()[None], expected[~large].sum()[None])]
    statistic = sum(((c - e)[e > 0] ** 2 / e[e > 0]).sum() for c, e in bins)
    freedom = int(large.sum()) - 1 + int(expected[~large].sum() > 0)
    return torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2).item()
