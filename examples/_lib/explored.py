# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run has saved for the target explorer, in a sentence for people."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_selfdistill.instruments.explorer.logit_summary import shapes

TEACHER = 1  # among the models of a record: student, teacher, reference


def likeliest(record: Mapping[str, Any], at: int) -> int:
    """Return the id of the teacher's likeliest token at token ``at`` of an explored response."""
    number, row = divmod(at, record["block_tokens"])
    block, forms = record["blocks"][number], shapes(len(record["models"]))
    ids, logits = (
        np.frombuffer(base64.b64decode(block[name]), kind).reshape(-1, *forms[name])[row]
        for name, kind in (("ids", "<i4"), ("logits", "<f4"))
    )
    return int(ids[logits[TEACHER].argmax()])


def about_the_largest_loss(record: Mapping[str, Any], end: int) -> str | None:
    """Return a sentence about the token with the largest loss if the teacher would take the token ``end`` there."""
    losses = [loss or 0.0 for loss in record["tokens"]["loss"]]
    at = losses.index(max(losses))
    if likeliest(record, at) != end:
        return None
    return (
        f"In the first step the loss was largest ({max(losses):.2g} nats) at {record['tokens']['text'][at]!r}: the "
        "teacher, who reads the hint, would have stopped before this token."
    )
