# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Forks of a rank, for functions that end their process; a fork has all modules of the rank and starts at once."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

STATUS_OF_AN_ERROR = 70
"""The exit status of a fork whose function raises."""


def in_a_fork(function: Callable[..., Any], *arguments: Any, seconds: int = 100) -> tuple[int, str]:
    """Call ``function(*arguments)`` in a fork, which ends after ``seconds``; return its exit status and its output."""
    with tempfile.TemporaryFile("w+") as output:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            signal.alarm(seconds)  # kills the fork, also if the rank is dead by then
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = STATUS_OF_AN_ERROR
            try:
                function(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended), output.read()
