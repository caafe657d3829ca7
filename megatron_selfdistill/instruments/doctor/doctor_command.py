# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report the software of this node, whether its versions work together, and the choices that a run will make.

    selfdistill doctor
    srun --label selfdistill doctor --brief --ranks 8        # a line per node
    torchrun --nproc-per-node 8 -m megatron_selfdistill doctor --selftest

The command exits with 1 if a run cannot start here, reports the fix, and warns about versions that are newer than
tested.  It needs only Python: a missing package is a line of the report.  With --selftest the ranks of the launch then
compute a table of checks, in less than three minutes once the node's compilers are warm.  The command exits with 1 if a
check fails or is not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from megatron_selfdistill.installation import install_command
from megatron_selfdistill.instruments.doctor.findings import (
    FAILURE,
    NOT_INSTALLED,
    OK,
    OPTIONAL,
    WARNING,
    Finding,
    examine,
    num_gpus,
    requirements,
)

MINUTES = 2.5
"""The limit for the checks in minutes, from the first line of this file to the last line of the table.

The warm-up, in which a cold node compiles, has the same limit in addition, and launchers take some more seconds."""
MARGIN_S = 15.0
"""The seconds after which a process ends if it has not met the other ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, run what the arguments ask for, and return 1 for a failure or a failed check, else 0."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="selfdistill doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="print one line, or one line for each failure")
    parser.add_argument(
        "--ranks",
        type=_positive(int),
        metavar="N",
        help="number of ranks that will start on this node; fewer GPUs are a failure",
    )
    parser.add_argument("--selftest", action="store_true", help="let the ranks of this launch compute and compare")
    parser.add_argument(
        "--sampler", choices=["megatron", "vllm"], help="the self-test's sampler (default: vllm if installed)"
    )
    parser.add_argument(
        "--minutes",
        type=_positive(float),
        metavar="M",
        help=f"limit for the checks, and the same limit for the warm-up (default: {MINUTES:g})",
    )
    arguments = parser.parse_args(argv)
    if not arguments.selftest:
        for name in ("sampler", "minutes"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} needs --selftest")
        return (brief if arguments.brief else report)(examine(arguments.ranks))
    limit_s = 60 * (arguments.minutes or MINUTES)
    with _ended_after(2 * limit_s + MARGIN_S):
        return examined_and_tested(arguments, began + limit_s)


def report(findings: Sequence[Finding]) -> int:
    """Print the findings and their consequences, and return 1 if a run cannot start here, else 0."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.status:<7}  {finding.found}")
        if finding.fix:
            print(f"{'':<{width}}           -> {finding.fix}")
    failures = [finding.name for finding in findings if finding.status == FAILURE]
    print()
    if failures:
        print(f"a run cannot start here: {', '.join(failures)}")
        if any(finding.found == NOT_INSTALLED for finding in findings if finding.status == FAILURE):
            print(f"{install_command('train')} installs what a run needs; megatron_selfdistill.loss needs torch alone")
        return 1
    for line in what_a_run_uses(findings):
        print(line)
    return 0


def brief(findings: Sequence[Finding]) -> int:
    """Print one line with this node's name and all findings that should be equal on all nodes, or only the failures.

    Returns 1 if a run cannot start here, else 0.
    """
    host = platform.node()
    failures = [finding for finding in findings if finding.status == FAILURE]
    for finding in failures:
        print(f"{host}: {FAILURE}: {finding.name}: {finding.found}{f' -> {finding.fix}' if finding.fix else ''}")
    if failures:
        return 1
    required, _ = requirements()
    others = [f"{f.name} {f.found}" for f in findings if f.name in required and not f.short]
    parts = [f"{finding.name} {finding.short}" for finding in findings if finding.short]
    parts.append(f"{len(others)} other packages {hashlib.sha256('; '.join(others).encode()).hexdigest()[:8]}")
    warnings = [finding.name for finding in findings if finding.status == WARNING]
    if warnings:
        parts.append(f"warnings about {', '.join(warnings)}")
    print(f"{host}: ok; {'; '.join(parts)}")
    return 0


def examined_and_tested(arguments: argparse.Namespace, deadline: float) -> int:
    """Print the reports of rank 0 and of every rank with failures, then run the self-test.

    Returns 1 on all ranks if a rank has a failure or a check fails, else 0.  ``deadline``: the end of the whole
    command, by the monotonic clock.
    """
    importlib.import_module("megatron_selfdistill.instruments.selftest.launch_environment").set_environment()
    rank = os.environ.get("RANK", "0")
    ranks = arguments.ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Eight imports of the same files show no more than one import.
    one_per_node = os.environ.get("LOCAL_RANK", "0") == "0"
    findings = examine(ranks, imports=one_per_node, limit_s=deadline - time.monotonic())
    failed = any(finding.status == FAILURE for finding in findings)
    if rank == "0" or failed:
        if rank != "0":
            print(f"rank {rank}:")
        (brief if arguments.brief else report)(findings)
    if failed:
        return 1  # the launcher ends the other ranks
    importlib.import_module("megatron_selfdistill.terminal").silence_known_warnings()
    selftest = importlib.import_module("megatron_selfdistill.instruments.selftest.node_test")
    outcomes = selftest.selftest(arguments.sampler, limit_s=deadline - time.monotonic())
    return 0 if selftest.passed(outcomes) else 1


def what_a_run_uses(findings: Sequence[Finding]) -> list[str]:
    """Return the lines about the choices that a run makes according to ``findings``."""
    gpu = num_gpus() > 0
    status = {finding.name: finding.status for finding in findings}
    has = {name: status[name] in (OK, WARNING) for name in OPTIONAL}  # a run does not check the version
    layers = "Transformer Engine's" if gpu and has["transformer-engine"] else "Megatron's local"
    fused = status["apex"] == OK
    adam = "apex's" if fused else "Transformer Engine's" if gpu and has["transformer-engine"] else "torch's"
    samplers = "megatron, vllm (colocated or on servers)" if has["vllm"] else "megatron, vllm on servers"
    return [
        f"device: {'cuda, over NCCL' if gpu else 'cpu, over gloo'}",
        f"layers: {layers} spec; Adam: {adam}",
        f"samplers that can be chosen: {samplers}",
    ]


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the process with status 1 if this context lasts longer than ``seconds``, even during a wait.

    The self-test's own watch starts only after all ranks have imported everything and found each other.
    """

    def end() -> None:
        print(f"rank {os.environ.get('RANK', '0')}: the self-test did not end within {seconds:.0f} s", flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _positive(kind: type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse shows this name in its error
    return number
