# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command line of ``selfdistill train``: its arguments, and the texts that it prints without a run.

One text explains the columns of the console line (`LINE`), which metrics/log.py prints in each step of a run.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from megatron_selfdistill.config import key_list
from megatron_selfdistill.config.key_list import SHORT, config_dir
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.config.schema.ranges import Bound, described, taken_apart
from megatron_selfdistill.errors import ConfigError

_DESCRIPTION = """\
Train a Megatron model on its own responses, towards what the model would predict if it knew the solution.

  selfdistill train model=Qwen/Qwen3-1.7B data.path=problems.jsonl run_dir=runs/first export=true
  selfdistill train checkpoint.load=DIR data.path=problems.jsonl run_dir=runs/first lr=1e-6 steps=200
  selfdistill train my.yaml run_dir=runs/second      # the file has the same keys: data: {path: problems.jsonl}
  selfdistill train --ranks 8 parallel=node_of_8 ..  # on the GPUs of this node
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
  130  Ctrl-C twice, before the run began, or with --ranks
(torchrun itself ends with 1 where a rank ends with another status than 0, and --ranks with that status)"""


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
    Column("reach/mean", "reach", ".3f", "how often the target would come to the places of the responses"),
    Column("response/length_mean", "length", ".1f", "mean response length (tokens)"),
    Column("response/truncated_share", "cut", ".2f", "share of responses cut at rollout.max_new_tokens"),
    Column("response/unfinished_share", "open", ".2f", "share of responses that end at rollout.horizon, unfinished"),
    Column("rewards/mean", "reward", ".3f", "mean reward of a response"),
    Column("episodes/turns_mean", "turns", ".1f", "mean responses per episode"),
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

    They are ``overrides`` (those of files first), ``config_name``, ``config_dir``, ``ranks``, ``print``, ``argv``,
    ``export`` (whether export=true is the last of its words) and ``about``: a function that returns the text that
    --help, --recipes or --keys asks for, or None.

    Raises: `ConfigError` for an option that is none, and for a file that is no configuration.
    """
    parser = _parser()
    argv = ["dry_run=true" if word == "--dry-run" else word for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such option; settings are key=value (`selfdistill --keys`)")
    words = with_files(arguments.overrides)
    exports = [word for word in words if word in ("export=true", "export=false")]
    arguments.overrides = [word for word in words if word not in exports]
    arguments.export = exports[-1:] == ["export=true"]
    directories = [Path(directory) for directory in arguments.config_dir]
    arguments.argv, arguments.about = argv, None
    if arguments.help:
        arguments.about = lambda: f"{parser.format_help()}\n{_more_help(directories)}"
    elif arguments.recipes:
        arguments.about = lambda: recipes(directories)
    elif arguments.keys is not None:
        arguments.about = lambda: keys(arguments.keys)
    return arguments


def with_files(words: Sequence[str]) -> list[str]:
    """Return the overrides in ``words`` behind those of the YAML files in ``words``, with long names.

    Raises: `ConfigError` for a file that is no configuration.
    """
    named = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
    in_files = [override for file in named for override in _overrides_in(Path(file))]
    return [*key_list.long_names(in_files), *key_list.long_names([word for word in words if word not in named])]


def _overrides_in(file: Path) -> list[str]:
    """Return the keys of a YAML file as overrides.  Raises: `ConfigError` for a file that is no mapping of keys."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected keys with values, such as data: {{path: problems.jsonl}}, got {values!r}")
    return [*_flat(values)]


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{key}={value if key in key_list.groups() else _in_hydra(value)}"


def _in_hydra(value: Any) -> str:
    """Return a value of YAML in the grammar of hydra's overrides."""
    if isinstance(value, list):
        return f"[{', '.join(map(_in_hydra, value))}]"
    if isinstance(value, str):
        return str(QuotedString(value, Quote.single).with_quotes())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


FIRST = (
    *("checkpoint.load", "data.path", "data.tokenizer", "run_dir", "num_steps", "data.global_batch_size"),
    *("rollout.max_new_tokens", "optimizer.lr", "target.anchor", "evaluation.path", "evaluation.every"),
    *("checkpoint.save_every", "schedule.max_tokens", "parallel.tensor_model_parallel_size"),
)
"""The keys that a first run sets, which `keys` shows first."""


def keys(section: str = "") -> str:
    """Return every key with default, meaning and range, by section, behind the `FIRST` keys.

    ``section``: a section or a key shows it alone; "method=NAME" is the section of this method, whose settings the list
    of all keys does not have; any other text is searched for in the names and the meanings of all keys.
    Raises: `ConfigError`, which names the nearest section, if no key has the text.
    """
    method = section.removeprefix("method=") if section.startswith("method=") else ""
    if section == "method":
        return f"methods: {', '.join(method_names())}\n`selfdistill --keys method=NAME` lists the settings of one"
    listed, lines = key_list.method_keys(method) if method else key_list.keys(), []
    section = "method" if method else section
    chosen = {key for key in listed if not section or key == section or key.startswith(f"{section}.")}
    if not chosen:
        words = re.compile(rf"(?<![^\W_]){re.escape(section)}", re.IGNORECASE)
        chosen = {key for key, one in listed.items() if words.search(key) or words.search(one.doc)}
    if not chosen:
        raise ConfigError(f"--keys {section}: {key_list.unknown_key(section)}")
    options = key_list.groups()
    if not section:
        lines = ["== a first run: `selfdistill --keys WORD` searches all keys, which follow =="]
        shorts = {key: f", {short}" for short, key in SHORT.items()}
        lines += [f"{key + shorts.get(key, ''):<40}{textwrap.shorten(listed[key].doc, 79)}" for key in FIRST]
    for name, cls in key_list.sections().items():
        own = [key for key in listed if key in chosen and key.rpartition(".")[0] == name]
        if own:
            group = f"\n(sets several at once: {_choices(name, options[name])})" if name in options else ""
            title = (inspect.getdoc(cls) or "").splitlines()[0].rstrip(".")
            lines.append(f"\n== {name or 'the run'}: {title} =={group}")
            lines += [_described(key, listed[key]) for key in own]
    return "\n".join(lines).lstrip("\n")


def recipes(directories: Sequence[Path] = ()) -> str:
    """Return every recipe of the project and of ``directories`` with the first sentence of its comment."""
    files = [file for place in (config_dir(), *directories) for file in sorted((place / "recipe").glob("*.yaml"))]
    width = max(len(file.stem) for file in files)
    return "\n".join(f"recipe={file.stem:<{width}}  {_first_comment(file)}" for file in files)


def _described(key: str, about: key_list.Key) -> str:
    plain, ranges, _ = taken_apart(about.kind)
    has_range = get_origin(plain) is list or any(isinstance(one, Bound) for one in ranges)
    shown_range = f"\n    Range: {described(about.kind)}." if has_range else ""
    short = "".join(f"\n    Short: {name}=" for name, long in SHORT.items() if long == key)
    return f"{key}={about.default}\n    {about.doc}{shown_range}{short}"


def at_least_1(text: str) -> int:
    """Return the number that an option has, for argparse; a number below 1 is refused."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="setting, or FILE.yaml with settings; the last one holds"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help, and exit")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="WORD",
        help="list every key (of a section, or with a word) with its default, meaning and range, and exit",
    )
    parser.add_argument("--recipes", action="store_true", help="list the recipes, and exit")
    parser.add_argument("--print", action="store_true", help="print the resolved configuration, and exit")
    parser.add_argument("--dry-run", action="store_true", help="the same as dry_run=true")
    parser.add_argument("--ranks", type=at_least_1, metavar="N", help="check, then train on N ranks of this node")
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a directory with further configuration groups"
    )
    return parser


def _more_help(directories: Sequence[Path]) -> str:
    groups = "\n".join(f"  {_choices(name, names)}" for name, names in key_list.groups().items() if name != "recipe")
    listed = "\n".join(f"  {line}" for line in recipes(directories).splitlines())
    return "\n\n".join(
        [f"recipes:\n{listed}", f"groups, which set several keys together:\n{groups}", _OTHERS, COLUMNS, _EXIT_CODES]
    )


def _choices(group: str, names: Sequence[str]) -> str:
    return f"{group}={'|'.join(names)}"


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = (line for line in takewhile(lambda line: line.startswith("#"), lines) if "@package" not in line)
    first, stop, _ = " ".join(line.lstrip("# ").rstrip() for line in comments).partition(". ")
    return textwrap.shorten(first + stop.rstrip(), 100, placeholder=" ...")
