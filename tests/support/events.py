# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Waiting for an event, for as long as the slowest machine takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(what: Callable[[], T], seconds: float = 300.0) -> T:
    """Call ``what`` until its value is true, and return this value; fail after ``seconds``, which are minutes."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        time.sleep(0.02)
    return value
