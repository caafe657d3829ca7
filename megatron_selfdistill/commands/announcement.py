# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The report of a run before its first step and after its last step, and the facts of its launch."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill import __version__
from megatron_selfdistill.annexes import OPTIONAL_PACKAGES
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS
from megatron_selfdistill.checkpoint.run_lock import LOCK
from megatron_selfdistill.commands.installation import installed_version
from megatron_selfdistill.config import Config, GivenKeys
from megatron_selfdistill.config.schema.whole_config import trains_all_weights
from megatron_selfdistill.data.problems import Problem, about_visits, are_one_hint
from megatron_selfdistill.metrics.phase_progress import duration
from megatron_selfdistill.model.architecture import uses_transformer_engine
from megatron_selfdistill.model.build import megatron_in_use
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.fused_kernels import kernels_in_use
from megatron_selfdistill.sources.configured_source import begun_list
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
    for line in begun_list(data, directory, anew=trainer.resumed_from is None):
        trainer.log.message(line)


def conclude(trainer: Trainer, first_step: int, seconds: float, report: Path | None = None) -> None:
    """Report the files of a run that has done its last step, and the commands that come next.

    ``first_step``: the steps that were done when this launch began, ``seconds`` ago.  ``report``: the report that the
    run writes; None for a run without one.
    """
    if trainer.step < trainer.config.num_steps:
        return  # the run was asked to stop, and has reported so
    trainer.checkpointer.finish()
    trainer.events.record(trainer.step, "finished")
    config, steps = trainer.config, trainer.step - first_step
    part = "" if steps == trainer.step else f" ({steps} of them in this launch)"
    lines = [
        f"done: {trainer.step} steps{part} in {duration(seconds)}; checkpoint: {trainer.checkpoint}",
        *([f"report: {report} (open it in a browser)"] if report is not None else []),
        *_next(config),
    ]
    for line in lines if steps > 0 else complete(config, trainer.step, trainer.checkpoint):
        trainer.log.message(line)


def _lines(trainer: Trainer) -> Iterator[str]:
    config, grid, data, learner = trainer.config, trainer.grid, trainer.run_data, trainer.learner
    yield f"{megatron_in_use()}; {layers()}; device: {grid.device.type}"
    yield kernels_in_use(model := unwrapped(learner.chunks[0]).config)
    if model.fp8:
        yield "warning: this project has not trained in FP8 on hardware: compare the first losses with those of bf16"
    yield layout(trainer)
    if config.has_teacher:
        yield f"loss: {trainer.loss_backend}"
    yield f"{_problems(trainer)}; contexts of at most {data.max_length} tokens"
    yield from about_visits(config.num_steps, config.data.global_batch_size, len(data.problems), data.kind)
    yield from learner.teachers.announced(data.problems.problems)
    yield str(learner.output_layer)
    yield data.ends.about
    if data.about_prompts:
        yield data.about_prompts
    yield from data.about_records
    if config.has_teacher and (line := about_one_hint(config.target.anchor, data.problems.problems)):
        yield line
    if data.num_controls:
        yield about_controls(data.num_controls, data.problems.problems)
    yield f"{start(trainer)}; everything goes to {trainer.run_directory.path}"
    yield from trainer.changes
    if trainer.stop.plan:
        yield trainer.stop.plan


def about_one_hint(anchor: str, problems: Sequence[Problem]) -> str | None:
    """Return a line about the target's ``anchor`` if all problems have the same solution, such as an instruction."""
    if not are_one_hint([problem.solution for problem in problems]):
        return None
    found = f"all {len(problems)} solutions are one text, which tells nothing about a single problem that could leak"
    if anchor == "student":
        return f"{found}: the target follows the student (target.anchor=student)"
    return f"warning: {found}, and the anchor holds back what it asks for; try target.anchor=auto"


def about_controls(number: int, problems: Sequence[Problem]) -> str:
    """Return a line about the ``number`` of controls of each response, and whether the problems have as many hints."""
    found = f"the teacher also reads each response after the hints of {number} other problems (target.num_controls)"
    others = len({problem.solution for problem in problems}) - 1
    return found if others >= number else f"{found}, of which some count twice: a problem meets {others} other hints"


def _problems(trainer: Trainer) -> str:
    data = trainer.run_data
    number = f"{len(data.problems)} {data.kind}"
    if data.skipped_later is not None:
        return f"{number} (what cannot be used is skipped when it comes up, and listed in {data.skipped_later})"
    return (
        f"{number} ({data.num_shortened} with a shortened solution; skipped: {data.num_too_long} too long, "
        f"{data.problems.num_skipped} bad)"
    )


def complete(config: Config, num_steps: int, checkpoint: Path) -> list[str]:
    """Return the lines of a launch that finds all steps of the run done."""
    return [
        f"complete: all {num_steps} steps were done before, nothing is trained; checkpoint: {checkpoint}",
        *_next(config),
    ]


def _next(config: Config) -> list[str]:
    """Return the command that converts the model of a run, if it came from Hugging Face, and how to train on."""
    run = config.run_dir
    kind = "hf" if trains_all_weights(config) else "peft"
    convert = shlex.join(["selfdistill", "convert", f"megatron-to-{kind}", "--megatron", run, "--out", f"{run}-{kind}"])
    came_from_hf = (Path(run) / HF_ASSETS).is_dir()  # others may have no architecture of Hugging Face
    train_on = "next: the same command with a larger num_steps trains on from there"
    return [*([f"next: {convert}"] if came_from_hf else []), train_on]


def launch_facts(trainer: Trainer, given: Collection[str] | None) -> dict[str, Any]:
    """Return the details of the event ``started``, as JSON values.

    ``given``: as in `train.train`; only a `GivenKeys`, the keys of a command line, tells the command.
    """
    arguments = given.arguments if isinstance(given, GivenKeys) else None
    world_size = trainer.grid.world_size
    facts = {
        "start": start(trainer),
        "command": None if arguments is None else _command(arguments, world_size),
        "recipe": next((text[7:] for text in arguments or () if text.startswith("recipe=")), None),
        "layout": f"{layout(trainer)}, {layers()}",
        "hardware": _hardware(trainer.grid.device, world_size),
        "versions": _versions(),
        "commit": commit(Path(__file__).parent),
    }
    return {name: value for name, value in facts.items() if value is not None}


def start(trainer: Trainer) -> str:
    """Return where the launch starts: the weights or the checkpoint, and the step."""
    begins = f"starts from {trainer.config.checkpoint.load or 'random weights'}"
    begins = f"resumes {trainer.resumed_from}" if trainer.resumed_from else begins
    return f"{begins}, at step {trainer.step} of {trainer.config.num_steps}"


def layout(trainer: Trainer) -> str:
    """Return the parallel sizes and the order of teacher and student."""
    grid = trainer.grid
    vpp = f" (VPP {grid.virtual_pipeline_model_parallel_size})" if grid.virtual_pipeline_model_parallel_size else ""
    return (
        f"TP {grid.tp_size} x PP {grid.pp_size}{vpp} x CP {grid.cp_size} x DP {grid.dp_size}, EP {grid.ep_size}; "
        f"pair order {trainer.learner.packing.pair_order or 'by the lengths of each step'}"
    )


def layers() -> str:
    """Return whose layers the model has."""
    return "layers: " + ("Transformer Engine" if uses_transformer_engine() else "Megatron's local spec")


def commit(directory: Path) -> str | None:
    """Return the git commit of the checkout that ``directory`` is part of, "+ changes" if files differ from it.

    None if git does not track ``directory``, as in an installed package, and where git fails or is not installed.
    """
    tracked = _git(directory, "ls-files", "--error-unmatch", "__init__.py")
    found = _git(directory, "rev-parse", "HEAD") if tracked else None
    if not found:
        return None
    return f"{found} + changes" if _git(directory, "status", "--porcelain", "--untracked-files=no") else found


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command(arguments: Sequence[str], world_size: int) -> str:
    path = os.environ.get("PYTHONPATH")  # it may hold functions that the configuration names
    setting = ["env", f"PYTHONPATH={path}"] if path else []
    if world_size == 1:
        return shlex.join([*setting, "selfdistill", "train", *arguments])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = [f"--nnodes={world_size // per_node}"] if world_size > per_node else ["--standalone"]
    launcher = ["torchrun", *nodes, f"--nproc-per-node={per_node}", "-m", "megatron_selfdistill", "train"]
    return shlex.join([*setting, *launcher, *arguments])


def _hardware(device: torch.device, world_size: int) -> str:
    ranks = f"{world_size} {'rank' if world_size == 1 else 'ranks'}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{ranks} on {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    return f"{ranks} on a CPU, {platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {"megatron_selfdistill": __version__, "Python": sys.version.split()[0]}
    packages = ("torch", "megatron-core", "transformer-engine", "transformers", *OPTIONAL_PACKAGES)
    found |= {name: version for name in packages if (version := installed_version(name))}
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})
