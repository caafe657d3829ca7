# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The last lines of a run: the files that the run has made, and the commands that come next."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_selfdistill.checkpoint.directory import HF_ASSETS


def done(
    run_dir: Path, num_steps: int, steps_here: int, seconds: float, checkpoint: Path, report: Path | None = None
) -> list[str]:
    """Return the last lines of a run that has done its last step.

    ``steps_here``: the steps of this launch.  ``report``: the report that the run writes; None for a run without one.
    """
    part = "" if steps_here == num_steps else f" ({steps_here} of them in this launch)"
    return [
        f"done: {num_steps} {_steps(num_steps)}{part} in {duration(seconds)}; checkpoint: {checkpoint}",
        *([f"report: {report} (open it in a browser)"] if report is not None else []),
        *_next(run_dir, num_steps),
    ]


def complete(run_dir: Path, num_steps: int, checkpoint: Path) -> list[str]:
    """Return the lines of a launch that finds all steps of the run done."""
    were = "the only step was" if num_steps == 1 else f"all {num_steps} steps were"
    first = f"complete: {were} done before, nothing is trained; checkpoint: {checkpoint}"
    return [first, *_next(run_dir, num_steps)]


def stopped(step: int, num_steps: int, reason: str | None, checkpoint: Path | None) -> str:
    """Return the last line of a run that ends early, after ``step`` steps; ``checkpoint``: None if no step is done."""
    where = f"checkpoint: {checkpoint}" if checkpoint is not None else "no step was done, so there is no checkpoint"
    return f"stopped after step {step} of {num_steps}: {reason}; started again, the same command continues; {where}"


def duration(seconds: float) -> str:
    """Return ``seconds`` as text for people: "8 s", "3:05 minutes", "26:03:05 hours"."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} hours" if hours else f"{minutes}:{rest:02d} minutes"


def _steps(number: int) -> str:
    return "step" if number == 1 else "steps"


def _next(run_dir: Path, num_steps: int) -> list[str]:
    run = shlex.quote(str(run_dir))
    convert = f"selfdistill convert megatron-to-hf --megatron {run} --out {shlex.quote(f'{run_dir}-hf')}"
    evaluate = f"selfdistill evaluate --megatron {run} --data held_out.jsonl --out results/after"
    came_from_hf = (run_dir / HF_ASSETS).is_dir()  # other models may have no architecture of Hugging Face
    return [
        f"next: {convert if came_from_hf else evaluate}",
        *([f"  or: {evaluate}"] if came_from_hf else []),
        f"  or: the same command with a larger num_steps (num_steps={2 * num_steps}) trains on from there",
    ]
