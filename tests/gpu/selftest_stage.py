# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the self-test of the node, ``selfdistill doctor --selftest``, with its checks as results.

python -m tests.gpu.selftest_stage [--ranks N] [--sampler megatron|vllm]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from megatron_selfdistill.instruments.selftest import node_test
from megatron_selfdistill.instruments.selftest.outcome import Outcome
from tests.gpu.results import report, seconds_left
from tests.gpu.runner import REPOSITORY


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sampler", choices=("megatron", "vllm"), default="megatron")
    options = parser.parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        return subprocess.run([*launcher, "-m", "tests.gpu.selftest_stage", *sys.argv[1:]], cwd=REPOSITORY).returncode
    prefix = "self-test" if options.ranks == 1 else f"self-test of {options.ranks} ranks"

    class Table(node_test._Table):
        """Reports each check when it comes, so that a self-test that is broken off has reported the ones before."""

        def add(self, outcome: Outcome) -> None:
            self.outcomes.append(outcome)
            if os.environ.get("RANK", "0") == "0":
                report(f"{prefix}: {outcome.name}", outcome)

    node_test._Table = Table  # type: ignore[misc]
    outcomes = node_test.selftest(options.sampler, limit_s=seconds_left() / 2)  # the warm-up takes as long at most
    return 0 if node_test.passed(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
