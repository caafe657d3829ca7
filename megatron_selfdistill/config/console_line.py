# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the console line of a step shows, without importing what writes it."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """One number of a console line, where the step has it."""

    key: str
    label: str
    form: str
    meaning: str


LINE = (
    Column("loss/mean", "loss", ".4f", "mean loss per response token (nats)"),
    Column("entropy/student", "entropy", ".4f", "the student's mean entropy (nats)"),
    Column("k/mean", "k", ".2f", "mean divisor of the mixed logits"),
    Column("top1_agreement", "top-1", ".3f", "share of tokens where student and teacher have the same most likely one"),
    Column("response/length_mean", "length", ".1f", "mean response length (tokens)"),
    Column("response/truncated_share", "cut", ".2f", "share of responses cut at rollout.max_new_tokens"),
    Column("gradient_norm", "grad", ".3g", "gradient norm before clipping"),
    Column("learning_rate", "lr", ".2g", "learning rate"),
    Column("seconds/step", "s", ".2f", "seconds of the step"),
)
"""The numbers of a console line, from left to right."""

COLUMNS = "\n".join(
    [
        "The console line of a step (metrics.console, every metrics.console_every steps); in brackets, its keys in",
        "metrics.jsonl, where docs/metrics.md explains all others:",
        *(f"  {column.label:<8} {column.meaning} ({column.key})" for column in LINE),
        "  left     time until the last step, from the third step of a launch on",
    ]
)
"""What the columns of the console mean, for people."""
