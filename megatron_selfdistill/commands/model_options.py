# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The options of the commands that read responses with student, teacher and reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the models, as `GivenModels.of` takes them."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run directory, Megatron checkpoint (an iter_ directory, or the one with the tracker file), or Hugging "
        "Face directory",
    )
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="iteration of a Megatron checkpoint (default: the tracker file's)"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="checkpoint of the teacher and of the reference (default: CHECKPOINT, as at the start of a run; of a run "
        "directory what the run has started from, except that a teacher that is not frozen has the student's weights)",
    )


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Add the options of the configuration and parse ``argv``; ends the process with status 2 for a wrong option."""
    parser.add_argument(
        "--tmp",
        type=Path,
        metavar="DIR",
        help="directory for converted Hugging Face models, which all nodes see (default: --out/..)",
    )
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a directory with further configuration groups"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="hydra overrides, e.g. target=strict")
    arguments = parser.parse_intermixed_args(argv)
    if wrong := [word for word in arguments.overrides if "=" not in word]:
        parser.error(f"expected one checkpoint and then key=value, got {wrong[0]}")
    return arguments
