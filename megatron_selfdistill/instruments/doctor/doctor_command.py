# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report the software of this node, and whether its versions work together.

    selfdistill doctor
    srun --label selfdistill doctor --brief --ranks 8        # a line per node
    torchrun --nproc-per-node 8 -m megatron_selfdistill doctor --selftest parallel.tensor_model_parallel_size=4

The command exits with 1 if a run cannot start here, reports the fix, and warns about versions that are newer than
tested.  It needs only Python: a missing package is a line of the report.  With --selftest the ranks of the launch then
prove that they meet, that they compute the same loss on shards of the vocabulary, and that a tiny training step in the
layout of the keys of parallel equals the step of one rank.  The command exits with 1 if a proof fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import platform
from collections.abc import Sequence

from megatron_selfdistill.commands.installation import install_command
from megatron_selfdistill.instruments.doctor.findings import FAILURE, NOT_INSTALLED, WARNING, Finding, examine
from megatron_selfdistill.instruments.doctor.versions import requirements

MINUTES = 3.0
"""The minutes without progress after which a self-test has hung; a cold node compiles meanwhile."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, run what the arguments ask for, and return 1 for a failure or a failed proof, else 0."""
    parser = argparse.ArgumentParser(
        prog="selfdistill doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="print one line, or one line for each failure")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks that will start here; fewer GPUs are a failure")
    parser.add_argument("--selftest", action="store_true", help="let the ranks of this launch compute and compare")
    parser.add_argument("--minutes", type=float, metavar="M", help="without progress until the end (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="parallel.KEY=VALUE", help="the layout of the self-test")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.selftest:
        return examined_and_tested(arguments)
    if arguments.minutes is not None or arguments.overrides:
        parser.error(f"{'--minutes' if arguments.minutes is not None else arguments.overrides[0]} needs --selftest")
    return (brief if arguments.brief else report)(examine(arguments.ranks))


def report(findings: Sequence[Finding]) -> int:
    """Print the findings, and return 1 if a run cannot start here, else 0."""
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
    else:
        print("a run can start here")
    return 1 if failures else 0


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


def examined_and_tested(arguments: argparse.Namespace) -> int:
    """Print the report of each node, in brief for all but the first one, then run the self-test.

    Returns 1 for a failure, after which the launcher ends the other ranks, and for a proof that fails; else 0.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        is_first = os.environ.get("RANK", "0") == "0"
        findings = examine(arguments.ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if (report if is_first and not arguments.brief else brief)(findings):
            return 1
    importlib.import_module("megatron_selfdistill.distributed.terminal").silence_known_warnings()
    node_test = importlib.import_module("megatron_selfdistill.instruments.selftest.node_test")
    reports = node_test.selftest(arguments.overrides, limit_s=60 * (arguments.minutes or MINUTES))
    return 0 if all(report.holds for report in reports.values()) else 1
