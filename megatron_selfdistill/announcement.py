# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The report of a run before its first step and after its last step."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

from megatron_selfdistill.checkpoint.run.run_lock import LOCK
from megatron_selfdistill.config import AdapterConfig
from megatron_selfdistill.data.packing import length_quantum
from megatron_selfdistill.data.problems import about_visits
from megatron_selfdistill.distributed.ranks import about_allocator
from megatron_selfdistill.launch_facts import launch_facts, layers, layout, start
from megatron_selfdistill.model.build import megatron_in_use, unwrapped
from megatron_selfdistill.model.fused_kernels import kernels_in_use
from megatron_selfdistill.report import next_steps
from megatron_selfdistill.sources.chat_logs import SKIPPED_FILE, list_skipped
from megatron_selfdistill.trainer import Trainer


def announce(trainer: Trainer, given: Collection[str] | None = None) -> None:
    """Write the resolved configuration into the run directory, unless this is a dry run, and report what will run.

    ``given``: as in `launch_facts`.
    """
    if not trainer.grid.is_reporter:
        return
    directory, data, dry_run = trainer.run_directory.path, trainer.run_data, trainer.config.dry_run
    if not dry_run:
        trainer.run_directory.write()
        trainer.events.record(trainer.step, "started", **launch_facts(trainer, given))
    for line in _lines(trainer):
        trainer.log.message(line)
    if dry_run and (directory / LOCK).exists():
        return  # the list belongs to the run that is using the directory
    if trainer.resumed_from is None:
        (directory / SKIPPED_FILE).unlink(missing_ok=True)
    if data.skipped:
        list_skipped(directory / SKIPPED_FILE, data.skipped)
        trainer.log.message(f"what was skipped, by file and line: {directory / SKIPPED_FILE}; {data.skipped[0]}")


def conclude(trainer: Trainer, first_step: int, seconds: float) -> None:
    """Report the files of a run that has done its last step, and the commands that come next.

    ``first_step``: the steps that were done when this launch began, ``seconds`` ago.
    """
    if trainer.step < trainer.config.num_steps:
        return  # the run was asked to stop, and has reported so
    trainer.checkpointer.finish()
    trainer.events.record(trainer.step, "finished")
    run_dir, steps = trainer.run_dir, trainer.step - first_step
    if steps > 0:
        lines = next_steps.done(run_dir, trainer.step, steps, seconds, trainer.checkpoint, trainer.report.path)
    else:
        lines = next_steps.complete(run_dir, trainer.step, trainer.checkpoint)
    for line in lines:
        trainer.log.message(line)


def _lines(trainer: Trainer) -> Iterator[str]:
    config, grid, data, learner = trainer.config, trainer.grid, trainer.run_data, trainer.learner
    yield f"{megatron_in_use()}; {layers()}; device: {grid.device.type}"
    yield kernels_in_use(unwrapped(learner.chunks[0]).config)
    if grid.device.type == "cuda":
        quantum = length_quantum(config.schedule.max_tokens)
        yield f"GPU memory: {about_allocator(os.environ)}; packed sequences of multiples of {quantum} tokens"
    yield layout(trainer)
    if config.adapter.rank:
        yield about_adapters(config.adapter, unwrapped(learner.chunks[0]).config.num_moe_experts)
    if learner.has_teacher:
        yield f"loss: {trainer.loss_backend}"
    yield f"{_problems(trainer)}; contexts of at most {data.max_length} tokens"
    what = "turns" if data.about_conversations else "problems"
    yield from about_visits(config.num_steps, config.data.global_batch_size, len(data.problems), what)
    yield str(learner.output_layer)
    if data.about_prompts:
        yield data.about_prompts
    yield from data.about_conversations
    yield f"{start(trainer)}; everything goes to {trainer.run_directory.path}"
    yield from trainer.changes
    if trainer.stop.plan:
        yield trainer.stop.plan


def about_adapters(adapter: AdapterConfig, num_moe_experts: int | None) -> str:
    """Return a line about the adapters that are trained, and about the experts that have none."""
    line = (
        f"adapters of rank {adapter.rank}, scale {adapter.scale:g}, on {', '.join(adapter.layers)}: all else is frozen"
    )
    return line if num_moe_experts is None else f"{line}; the routed experts have no adapters"


def _problems(trainer: Trainer) -> str:
    data = trainer.run_data
    number = f"{len(data.problems)} {'turns' if data.about_conversations else 'problems'}"
    if trainer.config.logged:
        file = trainer.run_directory.path / SKIPPED_FILE
        return f"{number} (what cannot be used is skipped when it comes up, and listed in {file})"
    return (
        f"{number} ({data.counts.truncated} with a shortened solution; skipped: {data.counts.dropped} too long, "
        f"{data.problems.num_skipped} bad)"
    )
