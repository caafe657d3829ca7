# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The exit statuses of the commands that read a model, and the message of each."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_selfdistill.compat.known_warnings import silence_known_warnings
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, VerifierError
from megatron_selfdistill.terminal import print_error

EXIT_REFUSED, EXIT_FAILED, EXIT_INTERRUPTED = 2, 4, 130


def ended(name: str, work: Callable[[], int]) -> int:
    """Do the work of the command ``name`` and return its exit status, after one message for an error of the user.

    The status is that of ``work``, or 2 for bad input, 4 for an engine or a verifier that failed, and 130 for Ctrl-C.
    """
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
        print(f"{name}: interrupted; no results were written", file=sys.stderr)
        return EXIT_INTERRUPTED
