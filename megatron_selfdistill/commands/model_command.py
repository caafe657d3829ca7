# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the commands that read a model share: options, and the exit status and message of each ending."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_selfdistill.distributed.terminal import print_error, silence_known_warnings
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, VerifierError

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
