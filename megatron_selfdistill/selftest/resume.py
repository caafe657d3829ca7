# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that was saved and resumed, against a run that never stopped, compared to the last bit."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.checkpoint.directory import iteration_name
from megatron_selfdistill.checkpoint.formats.torch_dist_reader import TorchDistReader
from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.metrics import read_metrics
from megatron_selfdistill.selftest.outcome import Figure, Outcome, largest
from megatron_selfdistill.selftest.tiny import LaunchUnderTest
from megatron_selfdistill.train import train

STEPS = 4
CLOCKS = ("seconds/", "tokens_per_second/", "memory/")
"""The metrics that differ between any two runs."""
_TE_SWITCH = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def save_and_resume(launch: LaunchUnderTest) -> Outcome:
    """Compare 4 steps at once with 2 steps, a checkpoint and 2 more steps: metrics, weights and optimizer state."""
    cuts = launch.cut(tp=2 if launch.world_size % 4 == 0 else 1)
    whole, halves = (launch.new_run_dir(name) for name in ("whole", "halves"))
    with deterministic():
        _train(launch, cuts, whole, STEPS)
        _train(launch, cuts, halves, STEPS // 2)
        _train(launch, cuts, halves, STEPS)
    figures = _compared(whole, halves) if launch.rank == 0 else _nothing()
    return Outcome(tuple(figures))


def _train(launch: LaunchUnderTest, cuts: ParallelConfig, run_dir: Path, num_steps: int) -> None:
    config = launch.config(
        cuts,
        run_dir,
        f"num_steps={num_steps}",
        f"checkpoint.save_every={STEPS // 2}",
        "optimizer.lr=1e-3",
        "optimizer.lr_warmup_steps=2",
        f"optimizer.lr_decay_steps={STEPS}",  # also of the half run
        "teacher.weights=ema",
        "teacher.ema_decay=0.9",
    )
    launch.new_group()
    status = train(config)
    if status:
        raise RuntimeError(f"a run of {num_steps} steps in {run_dir.name} ended with status {status}")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use kernels that repeat their last bits on GPUs; the kernels of a CPU always do."""
    if cpu.ON_CPU:
        yield
        return
    switches: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    allowed = os.environ.get(_TE_SWITCH)
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False
    os.environ[_TE_SWITCH] = "0"  # Transformer Engine reads it when it builds a layer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    except Exception as error:
        if "attention backend" in str(error):
            raise RuntimeError(f"no attention kernel here repeats its bits, flash-attn's do: {error}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filling
        if allowed is None:
            del os.environ[_TE_SWITCH]
        else:
            os.environ[_TE_SWITCH] = allowed


def _compared(whole: Path, halves: Path) -> Iterable[Figure]:
    """Compare two runs on one rank, which reads their files."""
    one, other = (_metrics(run_dir) for run_dir in (whole, halves))
    if len(one) != STEPS or [line.keys() for line in one] != [line.keys() for line in other]:
        raise RuntimeError(f"expected the same metrics of {STEPS} steps twice, got {len(one)} and {len(other)} steps")
    lines = {
        f"{key} of step {step}": _difference(a[key], b[key])
        for step, (a, b) in enumerate(zip(one, other, strict=True), 1)
        for key in a
    }
    tensors, moved = (
        _tensors(run_dir, STEPS, base, step) for run_dir, base, step in ((whole, halves, STEPS), (halves, halves, 2))
    )
    return _figures(largest("", lines, 0), largest("", tensors, 0), max(moved.values()))


def _figures(metrics: Figure, tensors: Figure, moved: float | None) -> tuple[Figure, ...]:
    return (
        Figure(f"metrics of {STEPS} steps, largest difference", metrics.value, 0.0, where=metrics.where),
        Figure("weights and optimizer, largest difference", tensors.value, 0.0, where=tensors.where),
        Figure("what changed after the checkpoint", moved, 1e-5, at_least=True),
    )


def _nothing() -> tuple[Figure, ...]:
    """Return the outcome of the ranks that do not compare."""
    none = Figure("", None, 0.0)
    return _figures(none, none, None)


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in read_metrics(run_dir)]


def _difference(one: float, other: float) -> float:
    """Return the difference of two metrics; 0 where both are equal or both are NaN."""
    return 0.0 if one == other or (math.isnan(one) and math.isnan(other)) else abs(one - other)


def _tensors(run_dir: Path, step: int, other_dir: Path, other_step: int) -> dict[str, float]:
    """Return the largest difference of each tensor of two checkpoints, over the full tensors."""
    one, other = (
        TorchDistReader(path / "checkpoints" / iteration_name(number))
        for path, number in ((run_dir, step), (other_dir, other_step))
    )
    if one.shapes != other.shapes:
        raise RuntimeError(f"{one.directory} and {other.directory} hold other tensors or shapes, expected the same")
    found = {}
    for key, shape in one.shapes.items():
        a, b = (source.read(key).double() for source in (one, other))
        found[key] = float((a - b).abs().max()) if math.prod(shape) else 0.0
    return found
