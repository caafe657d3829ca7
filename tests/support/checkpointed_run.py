# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A tiny training run that can be saved and resumed in any layout; its gradients depend on name and step only."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import layouts
import models
import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.checkpointer import Checkpointer
from megatron_selfdistill.checkpoint.formats.megatron_args import megatron_args
from megatron_selfdistill.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_selfdistill.config.schema.step_config import LearningRateDecay
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.model.build import build_chunks, build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Teacher, main_parameter

ADAM = OptimizerConfig(precision="fp32", lr=1e-2, lr_decay=LearningRateDecay(style="linear"), weight_decay=0.1)


@dataclass(frozen=True)
class Setup:
    kind: str = "gqa"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = ADAM
    teacher: str = "ema"
    reference: bool = False
    """Whether there is a reference besides the teacher, with the weights at the start."""
    seed: int = 0
    model_changes: dict[str, Any] = field(default_factory=dict)

    def cut(self, **sizes: Any) -> Setup:
        """Return this setup in another layout; ``sizes`` are those of `models.parallel` or of `ParallelConfig`."""
        short = inspect.signature(models.parallel).parameters
        layout = models.parallel(**sizes) if sizes.keys() <= short.keys() else ParallelConfig(**sizes)
        return dataclasses.replace(self, parallel=layout)

    @property
    def model(self) -> ModelConfig:
        return models.model_config(self.kind, **self.model_changes)


@dataclass
class CheckpointedRun:
    setup: Setup
    grid: RankGrid
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    teacher: Teacher
    reference: Teacher | None
    checkpointer: Checkpointer

    @property
    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in "chunks optimizer scheduler teacher reference".split()}

    @property
    def args(self) -> argparse.Namespace:
        return megatron_args(self.chunks[0], self.setup.model)

    def step(self, index: int) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        params = [p for chunk in self.chunks for p in unwrapped(chunk).parameters()]
        values = [p.data for p in params]
        for p in params:
            p.data = p.main_grad
        models.fill_from_names(self.chunks, seed=1000 + index)
        for p, value in zip(params, values, strict=True):
            p.data = value
        self.scheduler.step(1)
        assert self.optimizer.step()[0]
        self.teacher.update(self.optimizer)

    def save(self, step: int, **trainer_state: Any) -> Path:
        return self.checkpointer.save(step, **self.parts, trainer_state=trainer_state, args=self.args)

    def load_latest(self) -> dict[str, Any]:
        path = self.checkpointer.latest()
        assert path is not None
        return self.load(path)

    def load(self, path: Path) -> dict[str, Any]:
        saved = self.checkpointer.read(path)
        self.checkpointer.load(saved, **self.parts)
        return saved.trainer_state

    def parameters(self) -> dict[str, Any]:
        """Return the float32 parameters that the optimizer updates, for `layouts.join`."""
        for chunk in self.chunks:
            if self.setup.optimizer.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        return layouts.shards(self.chunks, lambda p: main_parameter(p, self.optimizer).clone())

    def weights(self) -> dict[str, Any]:
        """Return the parameters with which the model computes, in float32."""
        return layouts.shards(self.chunks, lambda p: p.detach().float().clone())

    def teacher_weights(self) -> dict[str, Any]:
        """Return the teacher's float32 master weights, or its weights where it has no master weights."""
        with self.teacher.masters_in_place():
            return layouts.shards(self.teacher.chunks, lambda p: p.detach().float().clone())

    def reference_weights(self) -> dict[str, Any]:
        """Return the reference's weights; empty without a reference."""
        chunks = self.reference.chunks if self.reference is not None else []
        return layouts.shards(chunks, lambda p: p.detach().clone())

    def adam_steps(self) -> list[Tensor]:
        """Return the ``step`` tensor of every parameter's Adam state."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [state["step"] for single in chained for state in single.optimizer.state.values()]


def start(
    setup: Setup, run_dir: Path, *, keep_last: int | None = None, async_save: bool = False, steps: int = 0
) -> CheckpointedRun:
    chunks, grid = models.build(setup.model, setup.parallel, optimizer=setup.optimizer, seed=setup.seed)
    config = unwrapped(chunks[0]).config
    student = wrap_for_training(chunks, setup.optimizer)
    optimizer, scheduler = build_optimizer(student, setup.optimizer, 10)
    optimizer.reload_model_params()  # the weights were filled after the main parameters were made

    def another_copy() -> list[Any]:
        return build_chunks(setup.model, config, grid, models.VOCAB_SIZE)

    teacher = Teacher(setup.teacher, student, another_copy, ema_decay=0.5)
    reference = Teacher("frozen", student, another_copy) if setup.reference else None
    checkpointer = Checkpointer(run_dir, grid, CheckpointConfig(keep_last=keep_last, async_save=async_save))
    run = CheckpointedRun(setup, grid, student, optimizer, scheduler, teacher, reference, checkpointer)
    for index in range(1, steps + 1):
        run.step(index)
    return run


def save_and_go_on(setup: Setup, run_dir: Path, async_save: bool = False) -> dict[str, Any]:
    """Take two steps, save a checkpoint, take two more steps, and return the end of this run without a stop."""
    run = start(setup, run_dir, steps=2, async_save=async_save)
    random_numbers()
    run.save(2, position=[3, 5])
    numbers = random_numbers()
    run.step(3)
    run.checkpointer.poll()
    run.step(4)
    run.checkpointer.finish()
    return end_of(run, numbers)


def resume_and_go_on(setup: Setup, run_dir: Path) -> dict[str, Any]:
    """Load the checkpoint into a run with other weights, take steps 3 and 4, and return the end of this run."""
    run = start(dataclasses.replace(setup, seed=5), run_dir, steps=1)
    state = run.load_latest()
    numbers = random_numbers()
    assert state == {"step": 2, "position": [3, 5]}
    if setup.teacher == "ema":
        copies = [p for chunk in run.teacher.chunks for p in unwrapped(chunk).parameters()]
        for master, copy in zip(run.teacher.masters, copies, strict=True):
            assert torch.equal(copy, master.to(copy.dtype))
    steps = run.adam_steps()
    assert [float(step) for step in steps] == [2.0] * len(steps)
    assert len({step.data_ptr() for step in steps}) == len(steps)
    run.step(3)
    run.step(4)
    return end_of(run, numbers)


def end_of(run: CheckpointedRun, numbers: list[float]) -> dict[str, Any]:
    """Return everything that two equal runs have in common at their end."""
    found = {"parameters": run.parameters()}  # first, since this completes a gather that overlaps
    found |= {"weights": run.weights(), "teacher": run.teacher_weights(), "reference": run.reference_weights()}
    return found | {"lr": run.optimizer.param_groups[0]["lr"], "random_numbers": numbers}


def random_numbers() -> list[float]:
    import random

    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return [random.random(), float(np.random.random()), torch.rand(()).item(), tracked]


def refusal_of(path: Path) -> str:
    """Return why a run with another model does not start from the weights of a checkpoint."""
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(models.model_config("gqa"), ParallelConfig(), seed=9)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, chunks)
    return str(caught.value)
