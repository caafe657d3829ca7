# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A plugin of pytest: the workers of pytest-xdist share the work of compiling what all of them import.

Every worker imports every test file, and pytest rewrites the assertions of a file for 15 milliseconds where no bytecode
of the file is cached, as in a fresh checkout.  Workers that begin with the same file reach each file at the same time,
and each of them would rewrite it.
"""

from __future__ import annotations

import compileall
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_selfdistill"


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Compile the files of this worker's part first, and then those that no other worker has compiled yet."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or sys.dont_write_bytecode:
        return
    roots = [Path(argument.split("::")[0]) for argument in session.config.args]
    tests = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("test_*.py")))]
    number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    for file in own_first(sorted(PACKAGE.rglob("*.py")), number, workers):
        compileall.compile_file(file, quiet=2)
    for file in own_first(tests, number, workers):
        with contextlib.suppress(OSError, SyntaxError):  # the collection of the file says so
            cache_rewritten(file, session.config)


def own_first(files: Sequence[Path], number: int, workers: int) -> list[Path]:
    """Return the files with the part of this worker first, and the others from the end of the last other part."""
    start, end = (len(files) * (number + more) // workers for more in (0, 1))
    return [*files[start:end], *reversed([*files[:start], *files[end:]])]


def cache_rewritten(file: Path, config: pytest.Config) -> None:
    """Write the bytecode of a test file into the cache from which pytest imports the file, unless it is there."""
    directory = rewrite.get_cache_dir(file)
    cached = directory / (file.stem + rewrite.PYC_TAIL)
    if rewrite._read_pyc(file, cached) is None and rewrite.try_makedirs(directory):
        status, code = rewrite._rewrite_test(file, config)
        rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, status, cached)
