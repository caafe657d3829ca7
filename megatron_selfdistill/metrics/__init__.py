# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log of a run: metrics of a step over the global batch, seconds per phase, samples, and files."""

from __future__ import annotations

from megatron_selfdistill.checkpoint.run_log import read_metrics, read_samples
from megatron_selfdistill.metrics.log import COLUMNS, MetricsLog, configured_log
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import batch_entropies, rollout_metrics, step_metrics, teacher_metrics

__all__ = [
    "COLUMNS",
    "MetricsLog",
    "Phases",
    "batch_entropies",
    "configured_log",
    "read_metrics",
    "read_samples",
    "rollout_metrics",
    "step_metrics",
    "teacher_metrics",
]
