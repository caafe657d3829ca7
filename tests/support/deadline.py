# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A time after which no test begins: the tests that are left are skipped, and the session says how many.

SELFDISTILL_DEADLINE holds the time, in seconds since 1970.  CI sets it for its longest stage, because machines differ
by a factor of three.  The files then begin at another one in every session, so that each of them has its turn.
"""

from __future__ import annotations

import math
import os
import time

import pytest

REASON = "the session's time is over (SELFDISTILL_DEADLINE)"
DEADLINE = float(os.environ.get("SELFDISTILL_DEADLINE", "inf"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rotate the files by the deadline, which is the same in all workers of a session."""
    files = list(dict.fromkeys(item.path for item in items))
    if not math.isinf(DEADLINE) and files:
        first = files[int(DEADLINE) % len(files)]
        place = next(number for number, item in enumerate(items) if item.path == first)
        items[:] = items[place:] + items[:place]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.time() > DEADLINE:
        pytest.skip(REASON)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    late = sum(REASON in str(report.longrepr) for report in skipped)
    if late:
        terminalreporter.write_line(f"WARNING: {late} tests did not run, since {REASON}")
