# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: a bucket of weights through a CUDA IPC handle to a second process, in both directions.

    python -m tests.gpu.ipc_stage

unit/rollout/test_ipc.py, where it is there, is this project's own transfer; torch's handles are tried in any case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tests.gpu.outcome import Figure, Outcome
from tests.gpu.results import held
from tests.gpu.runner import REPOSITORY

OWN_TESTS = REPOSITORY / "tests" / "unit" / "rollout" / "test_ipc.py"
BUCKET_BYTES = 2**26


def main() -> int:
    sound = held("CUDA IPC between two processes", shared_bucket)
    return 0 if held("weights over CUDA IPC", own_transfer) and sound else 1


def shared_bucket() -> Outcome:
    """Let another process read this one's bucket and write to it, and compare what both see."""
    if not torch.cuda.is_available():
        return Outcome(not_done="CUDA IPC needs an NVIDIA GPU, and this is a CPU")
    bucket = torch.arange(BUCKET_BYTES // 4, dtype=torch.float32, device="cuda")
    context = mp.get_context("spawn")
    mine, theirs = context.Pipe()
    other = context.Process(target=_read_and_double, args=(bucket, theirs))
    other.start()
    if not mine.poll(60):
        other.kill()
        raise RuntimeError("the second process did not open the handle within 60 s")
    read = mine.recv()
    other.join(30)
    other.kill()
    wrong_read = abs(read - float(torch.arange(BUCKET_BYTES // 4, dtype=torch.float64).sum())) / read
    doubled = torch.arange(BUCKET_BYTES // 4, dtype=torch.float32) * 2
    return Outcome(
        (
            Figure("sum that the other process read, relative", wrong_read, 1e-9),
            Figure("elements that it did not double", float((bucket.cpu() != doubled).sum()), 0.0),
        )
    )


def _read_and_double(bucket: torch.Tensor, answer: Connection) -> None:
    answer_sum = float(bucket.double().sum())
    bucket.mul_(2)
    torch.cuda.synchronize()
    answer.send(answer_sum)


def own_transfer() -> Outcome:
    """Run the project's own tests of the transfer that are marked ``gpu``."""
    if not torch.cuda.is_available():
        return Outcome(not_done="CUDA IPC needs an NVIDIA GPU, and this is a CPU")
    if not OWN_TESTS.exists():
        return Outcome(not_done=f"{Path(OWN_TESTS).relative_to(REPOSITORY)} does not exist")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(OWN_TESTS)]
    status = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"SELFDISTILL_TEST_GPU": "1"}).returncode
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with {status}, expected 0 or 1 (5: no test is marked gpu)")
    return Outcome((Figure("failed (1: some)", float(status), 0.0),))


if __name__ == "__main__":
    sys.exit(main())
