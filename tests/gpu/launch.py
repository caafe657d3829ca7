# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Launches the ranks of a stage that needs several processes."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.gpu.runner import REPOSITORY, import_paths


def launched(
    script: list[str], num_ranks: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run torchrun on this node; keep its output, and print it where it ends with another status than 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *script]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": import_paths(REPOSITORY / "examples")} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
    return done
