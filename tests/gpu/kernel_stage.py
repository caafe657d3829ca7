# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the claims about the loss's Triton kernels, spread over processes, and some of them under compute-sanitizer.

    python -m tests.gpu.kernel_stage claims [CLAIM ...]        all claims, or these, in this machine's way (see below)
    python -m tests.gpu.kernel_stage sanitizer

On a GPU the kernels are compiled, one process per core up to twelve; on a CPU Triton's interpreter runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import hidden_gpus

from tests.gpu.results import Figure, Outcome, held
from tests.gpu.runner import REPOSITORY

KERNELS = REPOSITORY / "tests" / "unit" / "kernels"
CLAIMS = [str(path) for path in sorted(KERNELS.glob("*_claims.py"))]
ON_GPU = os.environ.get(hidden_gpus.VARIABLE) != ""
MOST_PROCESSES = 12
SANITIZED = (
    "test_the_first_pass_of_any_shape_equals_float64",
    "test_strided_rows_and_backward_in_place_give_the_same_bits",
    "test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks",
)
"""Claims about shapes, strides and parts, where a kernel would read or write beyond its rows; one case of each."""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def main(what: str, claims: list[str]) -> int:
    if what == "sanitizer":
        return 0 if held("kernels under compute-sanitizer", sanitized) else 1
    return 0 if held("kernels of the loss", partial(all_claims, claims)) else 1


def environment() -> dict[str, str]:
    return os.environ | {"TRITON_INTERPRET": "0" if ON_GPU else "1", hidden_gpus.SWITCH: "1" if ON_GPU else "0"}


def cases(claims: list[str]) -> list[str]:
    """Return the node ids of all cases, or of those of ``claims``."""
    chosen = ["-k", " or ".join(claims)] if claims else []
    command = [*PYTEST, *CLAIMS, "--collect-only", *chosen]
    listed = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    found = [line for line in listed.stdout.splitlines() if "::test_" in line]
    if not found:
        raise RuntimeError(f"pytest collected no claims: {listed.stdout[-500:]} {listed.stderr[-500:]}")
    return found


def all_claims(claims: list[str]) -> Outcome:
    """Run the cases in several processes, and count those that ran and those that failed."""
    nodes = cases(claims)
    count = min(MOST_PROCESSES, os.cpu_count() or 1, len(nodes))
    with tempfile.TemporaryDirectory(prefix="selfdistill_claims_") as directory:
        started = []
        for number in range(count):
            report = Path(directory) / f"{number}.xml"
            command = [*PYTEST, "-v", f"--junitxml={report}", *nodes[number::count]]
            started.append((subprocess.Popen(command, cwd=REPOSITORY, env=environment()), report))
        statuses = [process.wait() for process, _ in started]
        outcomes = [outcome for _, report in started for outcome in verdicts(report)]
    if max(statuses) > 1:  # pytest's own: 1 is failed tests
        raise RuntimeError(f"pytest ended with {sorted(set(statuses))}, expected 0 or 1")
    failed = [name for name, verdict in outcomes if verdict == "failed"]
    skipped = [name for name, verdict in outcomes if verdict == "skipped"]
    print(f"{len(outcomes)} cases, {len(skipped)} skipped: {', '.join(skipped) or 'none'}", flush=True)
    return Outcome(
        (
            Figure("cases that failed", float(len(failed)), 0.0, where=", ".join(failed)[:200]),
            Figure("cases that ran", float(len(outcomes) - len(skipped)), 0.9 * len(nodes), at_least=True),
        )
    )


def verdicts(report: Path) -> list[tuple[str, str]]:
    """Return (name, passed, failed or skipped) of every case of a JUnit report."""
    found = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        verdict = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found.append((str(case.get("name")), verdict))
    return found


def sanitizer() -> str | None:
    """Return compute-sanitizer's path; CUDA's directory is often not on PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *(f"{h}/bin" for h in homes)]))


def sanitized() -> Outcome:
    """Run one case of each of three claims under compute-sanitizer's memcheck."""
    if not ON_GPU:
        return Outcome(not_done="compute-sanitizer looks at kernels on a GPU, and this is a CPU")
    tool = sanitizer()
    if tool is None:
        return Outcome(not_done="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    nodes = cases(list(SANITIZED))
    first = [next(node for node in nodes if claim in node) for claim in SANITIZED]
    command = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99", *PYTEST, *first]
    # The caching allocator hides reads beyond a tensor if they stay within its block.
    plain = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = subprocess.run(command, cwd=REPOSITORY, env=plain).returncode
    if status not in (0, 99):
        raise RuntimeError(f"pytest under compute-sanitizer ended with {status}")
    return Outcome((Figure("memory errors (1: some)", float(status == 99), 0.0),))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
