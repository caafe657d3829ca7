# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tests with the mark timing, of which each that fails runs once more: what `make test-timing` runs.

    python tools/timing_tests.py [ARGUMENTS OF PYTEST]

Such a test asserts on times or waits for a timeout, so that a machine that stands still for a moment can fail it.  A
test that fails twice fails.  The number of tests that ran again is printed, and added as a line to the file that the
variable SELFDISTILL_RERUNS names: CI prints the sum in its last line, so that nobody overlooks a second try.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TESTS_FAILED = 1
"""The exit status of pytest where tests have run and some have failed."""


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and those that failed once more; return the exit status of pytest."""
    with tempfile.TemporaryDirectory(prefix="selfdistill_timing_") as cache:
        pytest = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}"]
        status = subprocess.run([*pytest, "-m", "timing", *arguments]).returncode
        failed = _failed(Path(cache)) if status == TESTS_FAILED else []
        if failed:
            print("\n".join(f"[timing] once more: {test}" for test in failed), flush=True)
            status = subprocess.run([*pytest, "-m", "", *failed]).returncode
    print(f"[timing] {len(failed)} tests ran once more", flush=True)
    counts = os.environ.get("SELFDISTILL_RERUNS")
    if counts:
        with open(counts, "a", encoding="utf-8") as file:
            file.write(f"{len(failed)}\n")
    return status


def _failed(cache: Path) -> list[str]:
    """Return the ids of the tests that failed in the session with this cache."""
    file = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
