# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The share of a step in which servers generated while the trainer trained, and how long the servers waited."""

from __future__ import annotations

from collections.abc import Mapping


def overlap_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a step whose responses come from servers; none for another step.

    ``metrics`` holds seconds/step and, where servers generated, rollout/generation_seconds (in which they worked on
    requests, also on those of later steps) and rollout/waited_seconds (in which the trainer waited for responses).

    overlap/share = (generation - waited) / step, 0 where generation and training take turns.
    rollout/servers_waited_seconds = step - generation, at least 0.
    """
    generation = metrics.get("rollout/generation_seconds")
    step = metrics.get("seconds/step", 0.0)
    if generation is None or step <= 0:
        return {}
    return {
        "overlap/share": max(generation - metrics["rollout/waited_seconds"], 0.0) / step,
        "rollout/servers_waited_seconds": max(step - generation, 0.0),
    }
