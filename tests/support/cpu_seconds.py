# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A plugin of pytest: the CPU seconds of every test file, and a warning where ``make test`` spends too many.

There is one limit for each file and one for all files together.  With ``--file-seconds`` and ``--total-seconds``, as in
CI, the warning is an error and fails the session.  Without them, other work on a developer's machine does not make
``make test`` fail.

Counted are the seconds of this process and of all its descendants, also of those that have ended; waiting does not
count.  Of the server that forks the ranks (ranks.py) only the ranks count, since all files share its start; the seconds
of a server that has ended are those of this process's children, and are taken off again.

A slow or busy machine takes more seconds for the same work: every few seconds, a fixed piece of work shows how
much slower the machine is than the one on which the limits were chosen, and the file's seconds are divided by this
number.  With pytest-xdist each worker counts its own files, and the main process joins them.  The summary names the ten
slowest files, and with -v all files.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Generator, Mapping
from typing import Any

import psutil
import pytest

LIMIT_S = 20.0
TOTAL_LIMIT_S = 600.0
REFERENCE_S = 0.004
"""The CPU seconds of the work of `slowdown` on an idle core of the machine on which the limits were chosen."""
PERIOD_S = 5.0
"""The seconds for which a measurement of `slowdown` holds."""
_THIS_PROCESS = psutil.Process()
_SERVERS: dict[int, float] = {}
"""The CPU seconds of each server of ranks, without its ranks, by its process id."""
_SECONDS: pytest.StashKey[defaultdict[str, float]] = pytest.StashKey()
_BEFORE: pytest.StashKey[float] = pytest.StashKey()


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its descendants until now; those of ended ones, once waited for."""
    total, ended = 0.0, dict(_SERVERS)
    for process in (_THIS_PROCESS, *_THIS_PROCESS.children(recursive=True)):
        try:
            times, serves_ranks = process.cpu_times(), _serves_ranks(process)
        except psutil.Error:  # it has just ended
            continue
        total += times.children_user + times.children_system
        if serves_ranks:
            _SERVERS[process.pid] = times.user + times.system
            ended.pop(process.pid, None)
        else:
            total += times.user + times.system
    return total - sum(ended.values())


def _serves_ranks(process: psutil.Process) -> bool:
    """Return whether the process is the server of `ranks.RankPool`; the ranks, its forks, have its command line."""
    return process.ppid() == _THIS_PROCESS.pid and any("rank_worker.serve" in word for word in process.cmdline())


def slowdown() -> float:
    """Return how many times longer than `REFERENCE_S` this machine takes for the same work at present; at least 1.

    It is measured at most every `PERIOD_S`, so that the many short files do not wait for it.
    """
    return _slowdown_in(int(time.monotonic() / PERIOD_S))


@functools.lru_cache(1)
def _slowdown_in(period: int) -> float:
    """Measure `slowdown`: the shortest of five times, since one of a few milliseconds may fall into other load."""
    times = []
    for _ in range(5):
        before, total = time.process_time(), 0
        for number in range(100_000):
            total += number % 7
        times.append(time.process_time() - before)
    return max(1.0, min(times) / REFERENCE_S)


def too_slow(seconds: Mapping[str, float], limit: float) -> list[str]:
    """Return one message for each file that took longer than the limit."""
    return [
        f"{file} took {spent:.1f} CPU seconds, expected at most {limit:g} in make test: make its tests cheaper, or "
        "mark some of them full"
        for file, spent in sorted(seconds.items())
        if spent > limit
    ]


def too_slow_together(seconds: Mapping[str, float], limit: float) -> list[str]:
    """Return one message if all files together took longer than the limit."""
    total = sum(seconds.values())
    if total <= limit:
        return []
    return [
        f"all files together took {total:.1f} CPU seconds, expected at most {limit:g} in make test: make tests "
        "cheaper, or mark some of them full"
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--file-seconds",
        type=float,
        help="fail where a file takes more CPU seconds without its tests that are marked full, counted on the machine "
        f"for which they were chosen (by default a file that takes more than {LIMIT_S:g} is a warning)",
    )
    parser.addoption(
        "--total-seconds",
        type=float,
        help="fail where all files together take more CPU seconds, counted in the same way (by default more than "
        f"{TOTAL_LIMIT_S:g} are a warning)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SECONDS] = defaultdict(float)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_BEFORE] = cpu_seconds()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    result = yield
    if nextitem is None or nextitem.path != item.path:
        stash, now, own = item.config.stash, cpu_seconds(), time.process_time()
        if item.get_closest_marker("external") is None:  # make test runs none of these
            stash[_SECONDS][item.nodeid.split("::")[0]] += (now - stash[_BEFORE]) / slowdown()
        stash[_BEFORE] = now + time.process_time() - own  # the measurement belongs to no file
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for file, seconds in getattr(node, "workeroutput", {}).get("cpu_seconds", {}).items():
        node.config.stash[_SECONDS][file] += seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        seconds = config.stash[_SECONDS]
        config.workeroutput["cpu_seconds"] = dict(seconds)
    elif session.exitstatus == pytest.ExitCode.OK and any(is_error for is_error, _ in _messages(config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seconds = config.stash[_SECONDS]
    number = len(seconds) if config.get_verbosity() > 0 else 10
    ordered = sorted(seconds, key=seconds.__getitem__, reverse=True)
    slowest = [f"{file} {seconds[file]:.1f}" for file in ordered[:number]]
    if slowest:
        total = sum(seconds.values())
        terminalreporter.write_line(f"CPU seconds: {total:.1f}, of which {', '.join(slowest)}")
    for is_error, message in _messages(config):
        kind, colour = ("ERROR", "red") if is_error else ("WARNING", "yellow")
        terminalreporter.write_line(f"{kind}: {message}", **{colour: True})


def _messages(config: pytest.Config) -> list[tuple[bool, str]]:
    """Return every message, and whether it is an error, which it is where the command line has the limit."""
    if config.option.markexpr != "not full and not timing":  # another selection than that of make test
        return []
    seconds = config.stash[_SECONDS]
    found = []
    for option, default, messages_of in (
        ("--file-seconds", LIMIT_S, too_slow),
        ("--total-seconds", TOTAL_LIMIT_S, too_slow_together),
    ):
        limit = config.getoption(option)
        messages = messages_of(seconds, default if limit is None else limit)
        found += [(limit is not None, message) for message in messages]
    return found
