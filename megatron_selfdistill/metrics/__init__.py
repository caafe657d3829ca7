# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log of a run: metrics of a step over the global batch, seconds per phase, samples, and files."""

from __future__ import annotations

from megatron_selfdistill.metrics.log import MetricsLog, configured_log
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.metrics.step import rollout_metrics, step_metrics
from megatron_selfdistill.run_log import read_metrics, read_samples

__all__ = [
    "MetricsLog",
    "Phases",
    "configured_log",
    "read_metrics",
    "read_samples",
    "rollout_metrics",
    "step_metrics",
]
