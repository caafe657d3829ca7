# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the commands that read a model share: options, and the exit status and message of each ending."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.command_line import with_files
from megatron_selfdistill.distributed.roll_call import world_size
from megatron_selfdistill.distributed.terminal import print_error, silence_known_warnings
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, VerifierError
from megatron_selfdistill.metrics.phase_progress import PhaseProgress, SlowPhaseLines

if TYPE_CHECKING:
    from megatron_selfdistill.metrics.phases import Phases

EXIT_REFUSED, EXIT_FAILED, EXIT_INTERRUPTED = 2, 4, 130


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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="setting, or FILE.yaml with settings")
    return parser.parse_intermixed_args(argv)


def ended(name: str, work: Callable[[], int], outcome: str = "no results were written") -> int:
    """Do the work of the command ``name`` and return its exit status, after one message for an error of the user.

    The status is that of ``work``, or 2 for bad input, 4 for an engine or a verifier that failed, and 130 for Ctrl-C,
    after which the message states the ``outcome``.
    After SIGTERM the process ends with status 143, and removes its temporary directories before.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    silence_known_warnings()
    try:
        return work()
    except (CheckpointError, ConfigError, OSError) as error:
        print_error(f"{name}:", error)
        return EXIT_REFUSED
    except (EngineError, VerifierError) as error:
        print_error(f"{name}:", error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {outcome}", file=sys.stderr)
        return EXIT_INTERRUPTED


def given_config(
    arguments: argparse.Namespace, reserved: Mapping[str, str], evaluation: Mapping[str, Any]
) -> tuple[Config, frozenset[str]]:
    """Return the configuration of the command line ``arguments``, and the keys that the user has set.

    ``reserved``: the keys that options of the command set -> the options.  ``evaluation``: values of that section.
    The problems come from options, too.  Nothing is trained, so the size of a batch limits no layout.
    Raises: `ConfigError` for an override of a reserved key, and for an impossible configuration.
    """
    named = (with_files(arguments.overrides), arguments.config_name, arguments.config_dir)
    config, keys = configuration.load(*named), configuration.GivenKeys(*named)
    if taken := sorted(overridden_keys(arguments) & reserved.keys()):
        raise ConfigError(f"{taken[0]} cannot be set here: use {reserved[taken[0]]}")
    data = dataclasses.replace(config.data, path=None, global_batch_size=world_size())
    return dataclasses.replace(config, data=data, evaluation=dataclasses.replace(config.evaluation, **evaluation)), keys


def overridden_keys(arguments: argparse.Namespace) -> frozenset[str]:
    """Return the keys that the user has set on the command line."""
    return frozenset(override.lstrip("+~").partition("=")[0] for override in arguments.overrides)


@contextlib.contextmanager
def phases_shown(phases: Phases, *, enabled: bool) -> Iterator[None]:
    """Show ``phases`` of a command by lines on standard error; ``enabled``: False if this rank shows nothing."""
    if not enabled:
        yield
        return
    phases.listener = progress = PhaseProgress()
    lines = SlowPhaseLines(progress, lambda line: print(line, file=sys.stderr, flush=True), at_once=True)
    lines.start()
    try:
        yield
    finally:
        lines.close()
