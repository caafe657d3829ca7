# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run does besides training at a step, by the keys that count steps.

A step is counted from 1, and 0 stands for the state before the first step.
"""

from __future__ import annotations

from megatron_selfdistill.config.schema.whole_config import Config


def checkpoint_due(config: Config, step: int) -> bool:
    """Return whether a checkpoint is saved after ``step``."""
    every = config.checkpoint.save_every
    return step == config.num_steps or (every > 0 and step % every == 0)


def evaluation_due(config: Config, step: int) -> bool:
    """Return whether the run is evaluated after ``step``."""
    every = config.evaluation.every
    return bool(every) and (step % every == 0 or step == config.num_steps)


def report_due(config: Config, step: int) -> bool:
    """Return whether the report is to be written after ``step``."""
    every, evaluated = config.report.every, evaluation_due(config, step)
    return evaluated if every is None else every > 0 and (evaluated or step % every == 0)


def samples_due(config: Config, step: int) -> bool:
    """Return whether samples of ``step`` are to be shown."""
    return config.metrics.show_samples > 0 and (step == 1 or step % config.metrics.show_samples_every == 0)


def tokens_measured(config: Config, step: int) -> int | None:
    """Return n where ``step`` measures the teacher alone at one token in n; None where it does not measure."""
    return config.metrics.measure_every_token if step == 1 or step % config.metrics.teacher_every == 0 else None
