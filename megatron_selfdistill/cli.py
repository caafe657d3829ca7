# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The program ``selfdistill``: choose a command and run it.

This file imports no other package before the command is known: ``selfdistill doctor`` needs no other package.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence

from megatron_selfdistill.annexes import OPTIONAL_COMMANDS, Command
from megatron_selfdistill.commands.installation import MissingExtraError, install_command, require_extra, version
from megatron_selfdistill.distributed.terminal import guard_standard_error

EXIT_USAGE = 2
COMMANDS = {
    "train": Command(
        "train",
        "Train a model on its own responses.  `selfdistill key=value ...` does the same.",
        "data.path=problems.jsonl checkpoint.load=DIR run_dir=runs/first",
    ),
    **OPTIONAL_COMMANDS,
}
"""The name of a command -> its `Command`."""

_GROUPS = {"train": "train", "evaluate": "look", "convert": "prepare"}
"""The first command of a group -> the name of the group."""
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; ``argv`` None stands for the arguments of this process.

    Arguments that do not begin with a command belong to ``train``.  Returns 2, after a message or the list of commands
    on standard error, for an unknown command, for a package that is not installed, and for no arguments at all.  Output
    that nobody reads any more, as after ``| head``, is lost without a word.
    """
    guard_standard_error()
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print(overview(), file=sys.stderr)
        return EXIT_USAGE
    if argv[0] in ("-h", "--help", "--version"):
        print(version() if argv[0] == "--version" else overview())
        return 0
    name = command_of(argv)
    if name not in COMMANDS:
        print(f"selfdistill: {_unknown(name)}", file=sys.stderr)
        return EXIT_USAGE
    command = COMMANDS[name]
    try:
        if command.extra:
            require_extra(f"selfdistill {name}", command.extra)
        module = importlib.import_module(f"megatron_selfdistill.{command.module}")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("megatron_selfdistill"):
            raise
        remedy = f"run {install_command(command.extra)}; " if command.extra else ""
        print(f"selfdistill {name}: {error}; {remedy}`selfdistill doctor` says what is missing.", file=sys.stderr)
        return EXIT_USAGE
    return module.main(argv[1:] if argv[0] == name else argv) or 0


def command_of(argv: Sequence[str]) -> str:
    """Return the first word of ``argv`` if it has the form of a command, known or not; else ``train``."""
    return argv[0] if argv and _WORD.fullmatch(argv[0]) else "train"


def overview() -> str:
    """Return the help of the program: every command with its purpose and an example."""
    width, purposes = max(map(len, COMMANDS)), []
    for name, command in COMMANDS.items():
        purposes += ["", f"{_GROUPS[name]}:"] if name in _GROUPS else []
        purposes.append(f"  {name:<{width}}  {command.purpose}")
    return "\n".join(
        [
            "usage: selfdistill COMMAND ...",
            "       selfdistill key=value ...",
            "",
            "Let a language model teach itself by self-distillation, on Megatron Core.",
            "The first time: `make quickstart` in a clone of the project.",
            *purposes,
            "",
            "examples:",
            *[f"  selfdistill {name} {command.example}" for name, command in COMMANDS.items()],
            "",
            "On several ranks: selfdistill train --ranks 8 ...",
            "                  torchrun --nproc-per-node 8 -m megatron_selfdistill COMMAND ...",
            "`selfdistill COMMAND --help` explains a command.",
            "`selfdistill --version`, `--keys [WORD]` and `--recipes` list versions, keys, and recipes.",
        ]
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}, or key=value ..."
    return f"there is no command {name!r}; {hint}"
