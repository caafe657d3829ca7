# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Child processes that fail end with all that they have started.  This file, which they import, imports no torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import children
import psutil
import pytest


def fail_while_rank_0_waits(rank: int, pid_file: Path, way: str) -> None:
    if rank == 0:
        waiting = subprocess.Popen(["sleep", "600"], start_new_session=True)
        pid_file.write_text(f"{waiting.pid}\n")
        waiting.wait()
    wait_for_line(pid_file)
    os._exit(7) if way == "dies" else int("no number")


def what_a_child_knows(rank: int) -> tuple[int, str, bool]:
    return rank, os.environ["TOLD"], sys.modules["wave"] is None


def wait_for_line(file: Path) -> int:
    while not (file.exists() and file.read_text().endswith("\n")):
        time.sleep(0.01)
    return int(file.read_text())


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


@pytest.mark.parametrize(("way", "why"), [("raises", "no number"), ("dies", "the process ended with 7")])
def test_after_a_failure_of_a_child_all_children_and_theirs_are_killed_and_new_ones_start(tmp_path, way, why):
    two = children.Ranks(2, ["wave"], {"TOLD": "this"})
    with pytest.raises(RuntimeError, match=f"(?s)rank 1 of 2.*{why}"):
        two.run(fail_while_rank_0_waits, tmp_path / "pid", way)
    wait_for_end(wait_for_line(tmp_path / "pid"))
    assert two.run(what_a_child_knows) == [(0, "this", True), (1, "this", True)]
    two.close()
