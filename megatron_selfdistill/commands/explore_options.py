# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The options of `selfdistill explore`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_selfdistill.commands.model_options import add_models, parsed
from megatron_selfdistill.errors import ConfigError

DESCRIPTION = """Write a page that shows the target of every token of a response.

    selfdistill explore /models/Qwen3-8B --problem "What is 12 * 12?" --solution "12 * 12 = 144" -o target.html
    selfdistill explore runs/first --problem p.txt --solution s.txt --response r.txt

A run directory stands for its latest checkpoint, with the prompts, the target and the sampling of the run, and with the
checkpoint that the run has started from as a frozen teacher and as the reference.  Without --response the model
generates one.

The page needs nothing but a browser.  It colours each token by its divergence between student and target, shows the
candidates of student, teacher and target, and computes the target again for another teacher's weight, rule, anchor or
divergence.

key=value changes any key of the trainer: target.teacher_weight=2, target=strict, data.teacher_template=...,
rollout.temperature=0, parallel.tensor_model_parallel_size=2.  On several ranks:

    torchrun --nproc-per-node 2 -m megatron_selfdistill explore /models/Qwen3-8B --problem p.txt --solution s.txt \\
        parallel.tensor_model_parallel_size=2
"""
"""The text of --help."""

_LONGEST_NAME = 255
_TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".tex")


def exploration_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of `selfdistill explore`; ends the process with status 2 for options that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="selfdistill explore", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models(parser)
    text = "a text, or the name of a file with the text"
    parser.add_argument("--problem", required=True, metavar="TEXT", help=text)
    parser.add_argument("--solution", required=True, metavar="TEXT", help=f"what only the teacher sees: {text}")
    parser.add_argument("--response", metavar="TEXT", help=f"the response (default: the model generates one): {text}")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("target.html"), metavar="FILE", help="the page (default: target.html)"
    )
    return parsed(parser, argv)


def given_text(option: str, value: str) -> str:
    """Return the text of an option: the contents of the file that ``value`` names, else ``value`` itself.

    Raises: `ConfigError` for an empty text, and for a name of a text file that does not exist.
    """
    is_name = len(value) <= _LONGEST_NAME and "\n" not in value
    if is_name and Path(value).is_file():
        try:
            text = Path(value).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{option}: expected a text in UTF-8, got {value}: {error}") from error
    elif is_name and len(value.split()) == 1 and Path(value).suffix in _TEXT_FILES:
        raise ConfigError(f"{option}: expected a text or a file, got {value}, which does not exist")
    else:
        text = value
    if not text.strip():
        raise ConfigError(f"{option}: expected a text, got only white space")
    return text
