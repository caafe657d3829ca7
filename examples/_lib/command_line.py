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

from rich.console import Console

from megatron_selfdistill.terminal import silence_known_warnings

CONFIG_NAME = "quickstart"

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def example_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5, help="seed of the base, the data and the samples (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps of each variant (default: the example's own)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="directory of all outputs (default: runs)")
    return parser


def prepare_process(num_threads: int | None = 1) -> None:
    """Set the number of threads and silence warnings about libraries that a run on a CPU does not need.

    One thread is right for tiny models, whose matrices are so small that a second thread costs more time than it saves.
    None leaves the choice to torch, which takes a thread per core or what OMP_NUM_THREADS says.
    """
    if num_threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    silence_known_warnings()
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)


def command(overrides: Sequence[str], config_name: str = CONFIG_NAME, num_threads: int | None = 1) -> str:
    """Return the shell command that runs the trainer with some overrides from the current directory.

    ``num_threads`` is that of `prepare_process`.
    """
    if shutil.which("selfdistill"):
        program = "selfdistill"
    elif (script := Path(sys.executable).parent / "selfdistill").exists():
        program = _relative(script)
    else:
        program = f"{_relative(Path(sys.executable))} -m megatron_selfdistill.train"
    # examples/ holds the verifiers; as many threads as in this process give the same numbers to the last digit.
    settings = f"PYTHONPATH={shlex.quote(_relative(Path(__file__).parents[1]))}"
    settings += f" OMP_NUM_THREADS={num_threads}" if num_threads is not None else ""
    return f"{settings} {program} --config-name {config_name} {shlex.join(overrides)}"


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
