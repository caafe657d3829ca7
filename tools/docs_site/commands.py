# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference page of the commands: each command's own --help, and that of its subcommands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = {
    "selfdistill": ("-m", "megatron_selfdistill.train"),
    "python tools/convert.py": ("tools/convert.py",),
    "python tools/evaluate.py": ("tools/evaluate.py",),
    "python tools/evaluate.py compare": ("tools/evaluate.py", "compare"),
    "python tools/make_solutions.py": ("tools/make_solutions.py",),
    "python tools/doctor.py": ("tools/doctor.py",),
    "python -m megatron_selfdistill.serve": ("-m", "megatron_selfdistill.serve"),
}
"""A command as a user types it -> the arguments of Python that run it in a checkout."""
INTRODUCTION = """\
# Commands

This page shows what each command prints with `--help`."""


def page() -> str:
    """Return the page as Markdown.  Raises: RuntimeError where a command's --help fails."""
    lines = [INTRODUCTION]
    for name, arguments in COMMANDS.items():
        text = help_of(arguments)
        lines += ["", f"## {name}", "", "```text", text, "```"]
        for subcommand in subcommands(text):
            lines += ["", f"### {name} {subcommand}", "", "```text", help_of((*arguments, subcommand)), "```"]
    return "\n".join(lines) + "\n"


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
