# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records of explored responses as tensors again."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron_selfdistill.loss import Target
from megatron_selfdistill.loss.sharded.logit_summary import LogitSummary, shapes


def summary_of(record: Mapping[str, Any]) -> LogitSummary:
    """Return the summaries of all blocks of a record."""
    tensors = []
    for name, shape in shapes(len(record["models"])).items():
        dtype = np.dtype("<i4" if name == "ids" else "<f4")
        values = [np.frombuffer(base64.b64decode(block[name]), dtype).reshape(-1, *shape) for block in record["blocks"]]
        tensors.append(torch.from_numpy(np.concatenate(values).astype(np.float64)))
    return LogitSummary(*tensors)


def target_of(record: Mapping[str, Any]) -> Target:
    """Return the target of a record."""
    settings = record["settings"]
    anchored = settings["anchor"] == "reference"
    return Target(
        rule=settings["rule"],
        teacher_weight=settings["teacher_weight"],
        k_max=settings["k_max"],
        k=settings["k"],
        anchor=settings["anchor"],
        match=settings["match"] if anchored else None,
    )
