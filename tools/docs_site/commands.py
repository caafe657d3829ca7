# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference page of the commands: the --help of ``selfdistill``, of each command, and of its subcommands."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_selfdistill import cli

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "megatron_selfdistill")
UNLISTED = {"evaluate": ["compare"]}
"""Command -> its subcommands that its own --help describes but that argparse does not list."""
INTRODUCTION = """\
# Commands

The package installs one program, `selfdistill`. This page shows what the program and its commands print with
`--help`."""


def page() -> str:
    """Return the page as Markdown.  Raises: RuntimeError where a command's --help fails."""
    lines = [INTRODUCTION, "", *_help()]
    for name in cli.COMMANDS:
        lines += ["", f"## selfdistill {name}", "", *_help(name)]
        for subcommand in [*subcommands(help_of((*PROGRAM, name))), *UNLISTED.get(name, [])]:
            lines += ["", f"### selfdistill {name} {subcommand}", "", *_help(name, subcommand)]
    return "\n".join(lines) + "\n"


def _help(*words: str) -> list[str]:
    return ["```text", help_of((*PROGRAM, *words)), "```"]


@functools.cache
def help_of(arguments: tuple[str, ...]) -> str:
    """Return what Python with ``arguments`` and --help prints, at a width of 100 columns.

    Raises: RuntimeError, with what the command wrote to standard error, where it does not end with 0.
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, *arguments, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"expected {' '.join(command)} to print its help, got: {done.stderr.strip()}")
    return done.stdout.strip()


def subcommands(text: str) -> list[str]:
    """Return the subcommands that a help text lists, as argparse prints them under the heading COMMAND."""
    _, _, listed = text.partition("\n  COMMAND\n")
    return re.findall(r"^    ([a-z][\w-]*)", listed.partition("\n\n")[0], re.MULTILINE)
