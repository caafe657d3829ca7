# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: weights through a CUDA IPC handle to a second process: the test of the project's own transfer, on the GPU.

python -m tests.gpu.ipc_stage
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from tests.gpu.results import Figure, Outcome, all_held
from tests.gpu.runner import REPOSITORY

OWN_TESTS = REPOSITORY / "tests" / "unit" / "rollout" / "test_ipc.py"


def own_transfer() -> Outcome:
    """Run the project's own tests of the transfer that are marked ``gpu``."""
    if not torch.cuda.is_available():
        return Outcome(not_done="CUDA IPC needs an NVIDIA GPU, and this is a CPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(OWN_TESTS)]
    status = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"SELFDISTILL_TEST_GPU": "1"}).returncode
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with {status}, expected 0 or 1 (5: no test is marked gpu)")
    return Outcome((Figure("failed (1: some)", float(status), 0.0),))


if __name__ == "__main__":
    sys.exit(all_held({"weights over CUDA IPC": own_transfer}))
