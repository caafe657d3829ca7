# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the self-test of ``selfdistill doctor --selftest``, with its proofs as results.

python -m tests.gpu.selftest_stage [--ranks N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from megatron_selfdistill.instruments.selftest.node_test import PROOFS, selftest
from tests.gpu.results import Figure, Outcome, report, seconds_left
from tests.gpu.runner import REPOSITORY


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        return subprocess.run([*launcher, "-m", "tests.gpu.selftest_stage", *sys.argv[1:]], cwd=REPOSITORY).returncode
    prefix = "self-test" if options.ranks == 1 else f"self-test of {options.ranks} ranks"
    reports = selftest(limit_s=seconds_left() / len(PROOFS))
    if os.environ.get("RANK", "0") == "0":
        for name, found in reports.items():
            report(
                f"{prefix}: {name}",
                Outcome((Figure("share of the allowed error", found.error, 1.0, where=found.case),)),
            )
    return 0 if all(found.holds for found in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
