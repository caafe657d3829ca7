# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checks of responses: their replica, their ends, and their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import Response

T = TypeVar("T")


def own(grid: Any, everything: list[T]) -> list[T]:
    """Return the requests of this rank's replica, if the replicas take the requests in turns."""
    return everything[grid.dp_rank :: grid.dp_size]


def tokens(responses: Sequence[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


def cut_at(text: list[int], stops: Sequence[int]) -> tuple[list[int], str]:
    for i, token in enumerate(text):
        if token in stops:
            return text[: i + 1], "stop"
    return text, "length"


def stops_of(texts: Sequence[list[int]]) -> tuple[int, int]:
    """Return two tokens that end most of the texts at different lengths, but not two or three of the texts."""
    for stops in combinations(sorted({token for text in texts for token in text}), 2):
        cut = [cut_at(text, stops) for text in texts]
        lengths, reasons = {len(text) for text, _ in cut}, [reason for _, reason in cut]
        if 2 <= reasons.count("length") <= 3 and len(lengths) >= 4:
            return stops
    raise AssertionError("expected texts that end at different lengths; change the prompts")


def chi_square_p_value(sampled: Tensor, probs: Tensor) -> float:
    """Return the p-value of the sampled tokens under ``probs``; tokens with an expected count below 5 share one bin."""
    probs = probs.double()
    counts = torch.bincount(sampled, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0, "a token with probability 0 was sampled"
    expected = probs * len(sampled)
    large = expected >= 5
    bins = [(counts[large], expected[large]), (counts[~large].sum()[None], expected[~large].sum()[None])]
    statistic = sum(((c - e)[e > 0] ** 2 / e[e > 0]).sum() for c, e in bins)
    freedom = int(large.sum()) - 1 + int(expected[~large].sum() > 0)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2))
