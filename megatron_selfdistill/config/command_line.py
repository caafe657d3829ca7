# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command line of ``selfdistill train``: its arguments, and the texts that it prints without a run.

One text explains the columns of the console line (`LINE`), which metrics/log.py prints in each step of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from megatron_selfdistill import __version__
from megatron_selfdistill.config import key_list
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.config.overrides import yaml_text
from megatron_selfdistill.config.schema.ranges import Bound, described, taken_apart
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError

_DESCRIPTION = """\
Train a Megatron model on its own responses, towards what the model would predict if it knew the solution.

  selfdistill train data.path=problems.jsonl data.tokenizer=DIR checkpoint.load=DIR run_dir=runs/first
  torchrun --nproc-per-node 8 -m megatron_selfdistill.train parallel=node_of_8 ...
"""

_OTHERS = """\
`selfdistill --help` lists the other commands, and examples/slurm in the repository has sbatch scripts."""

_EXIT_CODES = """\
exit status:
  0    the run is complete, or it has saved and stopped on request (then RUN_DIR/stopped exists)
  1    an unforeseen error; the traceback is above
  2    bad input, or the run directory belongs to another run: the message says what to do
  3    a guard stopped the run, after a checkpoint
  4    no responses could be sampled; the run has saved, and can be started again
  5    the run made no progress; every rank's stack is in RUN_DIR/stacks
  130  Ctrl-C twice, or before the run began
(torchrun itself ends with 1 where a rank ends with another status than 0)"""


class Column(NamedTuple):
    """One metric of a console line; the line omits it where the step has no such metric."""

    key: str
    label: str
    form: str
    meaning: str


LINE = (
    Column("loss/mean", "loss", ".4f", "mean loss per response token (nats)"),
    Column("entropy/student", "entropy", ".4f", "the student's mean entropy (nats)"),
    Column("k/mean", "k", ".2f", "mean k, the temperature of the mixed logits"),
    Column(
        "top1_agreement", "top-1", ".3f", "share of tokens whose most likely token is the same for student and teacher"
    ),
    Column("response/length_mean", "length", ".1f", "mean response length (tokens)"),
    Column("response/truncated_share", "cut", ".2f", "share of responses cut at rollout.max_new_tokens"),
    Column("gradient_norm", "grad", ".3g", "gradient norm before clipping"),
    Column("learning_rate", "lr", ".2g", "learning rate"),
    Column("seconds/step", "s", ".2f", "seconds of the step"),
)
"""The columns of a console line, from left to right."""

COLUMNS = "\n".join(
    [
        "The console line of a step (every metrics.console_every steps; 0 is never); in brackets, its keys in",
        "metrics.jsonl (docs/metrics.md explains all metrics):",
        *(f"  {column.label:<8} {column.meaning} ({column.key})" for column in LINE),
        "  left     time until the last step, from the third step of a launch on",
    ]
)
"""The explanation of the columns, as ``--help`` prints it."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line ``argv``, by default that of this process.

    They are ``overrides``, ``config_name``, ``config_dir``, ``print``, ``argv`` (unchanged) and ``about``: a function
    that returns the text that --help, --version, --recipes or --keys asks for, or None.
    """
    parser = _parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_intermixed_args(argv)
    directories = [Path(directory) for directory in arguments.config_dir]
    arguments.argv, arguments.about = argv, None
    if arguments.help:
        arguments.about = lambda: f"{parser.format_help()}\n{_more_help(directories)}"
    elif arguments.version:
        arguments.about = version
    elif arguments.recipes:
        arguments.about = lambda: recipes(directories)
    elif arguments.keys is not None:
        arguments.about = lambda: keys(arguments.keys)
    return arguments


def version() -> str:
    """Return the versions of this package, torch, megatron-core and Python; torch is not imported."""
    return "\n".join(
        [
            f"megatron_selfdistill {__version__}",
            *(f"{name} {_installed(name)}" for name in ("torch", "megatron-core")),
            f"Python {sys.version.split()[0]}",
        ]
    )


def keys(section: str = "") -> str:
    """Return every key with default, meaning and range, by section; with ``section``, only that section, or that key.

    ``section``: "method=NAME" is the section of this method, whose settings the list of all keys does not have.
    Raises: `ConfigError`, which names the nearest section, if there is no such section.
    """
    method = section.removeprefix("method=") if section.startswith("method=") else ""
    if section == "method":
        return f"methods: {', '.join(method_names())}\n`selfdistill --keys method=NAME` lists the settings of one"
    listed, lines = key_list.method_keys(method) if method else key_list.keys(), []
    kinds = key_list.method_kinds(method) if method else key_list.kinds()
    section = "method" if method else section
    chosen = {key for key in listed if not section or key == section or key.startswith(f"{section}.")}
    if not chosen:
        raise ConfigError(f"--keys {section}: {key_list.unknown_key(section)}")
    options = key_list.groups()
    for name, title in _sections():
        own = [key for key in listed if key in chosen and key.rpartition(".")[0] == name]
        if own:
            group = f"\n(sets several at once: {_choices(name, options[name])})" if name in options else ""
            lines.append(f"\n== {name or 'the run'}: {title} =={group}")
            lines += [_described(key, *listed[key], kinds) for key in own]
    return "\n".join(lines).lstrip("\n")


def recipes(directories: Sequence[Path] = ()) -> str:
    """Return every recipe of the project and of ``directories`` with the first sentence of its comment."""
    files = [file for place in (config_dir(), *directories) for file in sorted((place / "recipe").glob("*.yaml"))]
    width = max(len(file.stem) for file in files)
    return "\n".join(f"recipe={file.stem:<{width}}  {_first_comment(file)}" for file in files)


def _described(key: str, default: Any, doc: str, kinds: Mapping[str, Any]) -> str:
    """Return the lines of a key; those of a section within a section have the meaning and range of each entry."""
    if (entries := key_list.entries().get(key)) is None:
        return f"{key}={default}\n    {doc}{_range(kinds[key])}"
    shown = dataclasses.asdict(default)
    ranges = {name: _range(kinds[f"{key}.{name}"]).replace("\n   ", "") for name in entries}
    lines = [f"\n    {name}: {meaning}{ranges[name]}" for name, (_, meaning) in entries.items()]
    return f"{key}={shown}\n    {doc}{''.join(lines)}"


def _range(kind: Any) -> str:
    """Return the line with the range of a number or a list of the type ``kind``; other meanings name the choices."""
    plain, ranges, _ = taken_apart(kind)
    is_shown = get_origin(plain) is list or any(isinstance(one, Bound) for one in ranges)
    return f"\n    Range: {described(kind)}." if is_shown else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration; the last of equal keys holds")
    parser.add_argument("-h", "--help", action="store_true", help="show this help, and exit")
    parser.add_argument("--version", action="store_true", help="show versions, and exit")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="SECTION",
        help="list every key (of a section) with its default, meaning and range, and exit",
    )
    parser.add_argument("--recipes", action="store_true", help="list the recipes, and exit")
    parser.add_argument("--print", action="store_true", help="print the resolved configuration, and exit")
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a directory with further configuration groups"
    )
    return parser


def _more_help(directories: Sequence[Path]) -> str:
    groups = "\n".join(f"  {_choices(name, names)}" for name, names in key_list.groups().items() if name != "recipe")
    listed = "\n".join(f"  {line}" for line in recipes(directories).splitlines())
    return "\n\n".join(
        [
            f"recipes:\n{listed}",
            f"groups, which set several keys together:\n{groups}",
            _OTHERS,
            COLUMNS,
            _EXIT_CODES,
        ]
    )


def _sections() -> Iterator[tuple[str, str]]:
    """Yield name and title of each section; the keys that belong to no section have the name ""."""
    yield "", "the keys of no section"
    for name, default in vars(Config()).items():
        if hasattr(type(default), "__dataclass_fields__"):
            yield name, (inspect.getdoc(type(default)) or "").splitlines()[0].rstrip(".")


def _choices(group: str, names: Sequence[str]) -> str:
    return f"{group}={'|'.join(names)}"


def _first_comment(file: Path) -> str:
    comments = []
    for line in yaml_text(file).splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            comments.append(line.lstrip("# ").rstrip())
    first, stop, _ = " ".join(comments).partition(". ")
    return textwrap.shorten(first + stop.rstrip(), 100, placeholder=" ...")


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
