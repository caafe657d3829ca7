# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The columns of the console line of a step, and their meaning; metrics/log.py prints the line."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """One metric of a console line; the line omits it where the step has no such metric."""

    key: str
    label: str
    form: str
    meaning: str


LINE = (
    Column("loss/mean", "loss", ".4f", "mean loss per response token (nats)"),
    Column("entropy/student", "entropy", ".4f", "the student's mean entropy (nats)"),
    Column("k/mean", "k", ".2f", "mean k, the temperature of the mixed logits"),
    Column(
        "top1_agreement", "top-1", ".3f", "share of tokens whose most likely token is the same for student and teacher"
    ),
    Column("response/length_mean", "length", ".1f", "mean response length (tokens)"),
    Column("response/truncated_share", "cut", ".2f", "share of responses cut at rollout.max_new_tokens"),
    Column("gradient_norm", "grad", ".3g", "gradient norm before clipping"),
    Column("learning_rate", "lr", ".2g", "learning rate"),
    Column("seconds/step", "s", ".2f", "seconds of the step"),
)
"""The columns of a console line, from left to right."""

COLUMNS = "\n".join(
    [
        "The console line of a step (metrics.console, every metrics.console_every steps); in brackets, its keys in",
        "metrics.jsonl (docs/metrics.md explains all metrics):",
        *(f"  {column.label:<8} {column.meaning} ({column.key})" for column in LINE),
        "  left     time until the last step, from the third step of a launch on",
    ]
)
"""The explanation of the columns, as ``--help`` prints it."""
