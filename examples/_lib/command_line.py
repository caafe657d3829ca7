# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command line of an example: its options, its console, and the command that repeats a run by hand."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_selfdistill import config as configuration
from megatron_selfdistill.distributed.terminal import silence_known_warnings

CONFIG_NAME = "quickstart"
EXAMPLES = Path(__file__).resolve().parents[1]
"""The directory that holds the verifiers of the examples' tasks."""

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def example_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5, help="seed of the base, the data and the samples (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps of each variant (default: the example's own)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="directory of all outputs (default: runs)")
    return parser


def prepare_process(num_threads: int | None = 1) -> None:
    """Set threads and PYTHONPATH, and silence warnings about libraries that a run on a CPU does not need.

    One thread is right for tiny models, whose matrices are so small that a second thread costs more time than it saves.
    None leaves the choice to torch, which takes a thread per core or what OMP_NUM_THREADS says.
    """
    if num_threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not any(place and Path(place).resolve() == EXAMPLES for place in places):
        places.insert(0, _relative(EXAMPLES))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))  # the report's command names it
    silence_known_warnings()
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)


def command(arguments: Sequence[str], config_name: str = CONFIG_NAME, num_threads: int | None = 1) -> str:
    """Return the shell command that runs the trainer with some arguments from the current directory.

    ``num_threads`` is that of `prepare_process`.
    """
    if shutil.which("selfdistill"):
        program = "selfdistill"
    elif (script := Path(sys.executable).parent / "selfdistill").exists():
        program = _relative(script)
    else:
        program = f"{_relative(Path(sys.executable))} -m megatron_selfdistill.train"
    # As many threads as in this process give the same numbers to the last digit.
    settings = f"PYTHONPATH={shlex.quote(_relative(EXAMPLES))}"
    settings += f" OMP_NUM_THREADS={num_threads}" if num_threads is not None else ""
    name = "" if config_name == "train" else f"--config-name {config_name} "
    return f"{settings} {program} {name}{shlex.join(arguments)}"


def write_recipe(directory: Path, name: str, overrides: Sequence[str]) -> None:
    """Write what ``overrides`` set as ``directory``/recipe/``name``.yaml, for --config-dir and recipe=``name``."""
    config = yaml.safe_load(configuration.to_yaml(configuration.load(overrides)))
    chosen: dict[str, Any] = {"defaults": ["_self_", "/groups"]}
    for key in sorted(configuration.GivenKeys(overrides)):
        *sections, last = key.split(".")
        source, target = config, chosen
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[last] = source[last]
    path = directory / "recipe" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{yaml.safe_dump(chosen, sort_keys=False)}", encoding="utf-8")


def announce(title: str, command: str) -> None:
    """Print a heading and, dim, the command that does the same by hand."""
    console.rule(f"[bold]{title}", align="left")
    console.print(command, style="dim", markup=False, soft_wrap=True)


def _relative(path: Path) -> str:
    """Return ``path`` relative to the current directory if ``path`` lies below that directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
