# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The facts of a launch for events.jsonl and the report: command, versions, hardware, layout, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill import __version__
from megatron_selfdistill.config import GivenKeys, shown_argument
from megatron_selfdistill.model.architecture import uses_transformer_engine
from megatron_selfdistill.trainer import Trainer

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "vllm")


def launch_facts(trainer: Trainer, given: Collection[str] | None) -> dict[str, Any]:
    """Return the details of the event ``started``, as JSON values.

    ``given``: as in `train.train`; only a `GivenKeys`, the keys of a command line, tells the command.
    """
    arguments = [*map(shown_argument, given.arguments)] if isinstance(given, GivenKeys) else None
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
        f"pair order {trainer.learner.pair_order}"
    )


def layers() -> str:
    """Return whose layers the model has."""
    return "layers: " + ("Transformer Engine" if uses_transformer_engine() else "Megatron's local spec")


def commit(directory: Path) -> str | None:
    """Return the git commit of the checkout that ``directory`` is part of, "+ changes" if files differ from it.

    None where git does not track ``directory``, as in an installed package, and where git fails or is not installed.
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
    if world_size == 1:
        return shlex.join(["selfdistill", "train", *arguments])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = [f"--nnodes={world_size // per_node}"] if world_size > per_node else ["--standalone"]
    launcher = ["torchrun", *nodes, f"--nproc-per-node={per_node}", "-m", "megatron_selfdistill", "train"]
    return shlex.join([*launcher, *arguments])


def _hardware(device: torch.device, world_size: int) -> str:
    ranks = f"{world_size} {'rank' if world_size == 1 else 'ranks'}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{ranks} on {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    return f"{ranks} on a CPU, {platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {"megatron_selfdistill": __version__, "Python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})
