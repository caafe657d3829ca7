# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command of ``make test-gpu``: stages with time limits, a table of results, and one exit status.

    python -m tests.gpu                  one GPU, at most eleven minutes
    python -m tests.gpu --gpus 8         also NCCL, hangs and vLLM on eight
    python -m tests.gpu --device cpu     the same stages as far as a CPU can run them

A stage that fails or hangs does not stop the next one.  The command ends with 1 where a check failed.  At the end of
each stage the results of a GPU are appended to docs/support.jsonl, from which tools/support_table.py writes README's
support table and docs/support.md.  The results of a CPU go where --record says only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import hidden_gpus

from tests.gpu import runner, stages
from tests.gpu.results import FAILED, SKIPPED, Result

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn", "flash-linear-attention"),
    *("apex", "vllm", "liger-kernel"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen stages, print the table, record the results; return 1 where a check failed, else 0."""
    options = parsed(arguments)
    if options.device == "cuda" and not hidden_gpus.number(os.environ.get(hidden_gpus.VARIABLE)):
        print("expected an NVIDIA GPU and a torch with CUDA, found none; on a CPU use --device cpu", file=sys.stderr)
        return 1
    began = time.monotonic()
    run = now()
    where = {"device": device_name(options), "date": run[:10], "commit": commit(), "run": run}
    chosen = stages.chosen(options)
    limit = f"{sum(stage.limit_s for stage in chosen) / 60:.1f} minutes at most"
    print(f"test-gpu: {where['device']}, commit {where['commit']}; {limit}", flush=True)
    print(f"test-gpu: {versions()}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an end that kills the stage, too
    found = runner.run_stages(chosen, lambda line: print(line, flush=True), partial(keep, options, where))
    print("\n" + runner.table(found, rows_of_checks(), where))
    failed = {result.check for result in found if result.verdict == FAILED}
    skipped = {result.check for result in found if result.verdict == SKIPPED}
    all_checks = {result.check for result in found}
    print(
        f"\n{len(all_checks - failed - skipped)} of {len(all_checks)} checks passed, {len(skipped)} skipped, "
        f"{len(failed)} failed, in {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, choices=(1, 8), default=1, help="8 adds the stages that need eight GPUs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages only")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the results to this file of JSON lines")
    parser.add_argument(
        "--apex-source", type=Path, metavar="DIR", default=os.environ.get("APEX_SOURCE"), help="NVIDIA apex's sources"
    )
    parser.add_argument("--vllm-python", metavar="EXE", help="a Python with vLLM, for the stages with servers")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.record is not None and options.record.resolve() == support_results():
        parser.error(
            "expected another file than docs/support.jsonl for --record: that file has the results of GPUs only"
        )
    return options


def rows_of_checks() -> dict[str, list[str]]:
    """Return of each check the rows of README's support table that need it, by the rows' ids."""
    rows: dict[str, list[str]] = {}
    for row in json.loads((REPOSITORY / "docs" / "support.json").read_text())["rows"]:
        for check in dict.fromkeys(check for level in row["levels"] for check in level["checks"]):
            rows.setdefault(check, []).append(row["id"])
    return rows


def keep(options: argparse.Namespace, where: dict[str, str], found: Sequence[Result]) -> None:
    """Append one line per result, with where, when and on which commit it was found, and write the tables anew.

    The file is that of --record, and else docs/support.jsonl for a GPU and none for a CPU.  Only docs/support.jsonl has
    tables, in README and in docs/support.md.  A run that ends early has kept the results of the stages before.
    """
    own = support_results()
    path = options.record or (own if options.device == "cuda" else None)
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(result) | where) + "\n" for result in found)
    if path.resolve() == own:
        subprocess.run([sys.executable, str(REPOSITORY / "tools" / "support_table.py")], check=True)
    print(f"results appended to {path}", flush=True)


def support_results() -> Path:
    """Return the file from which tools/support_table.py writes its tables."""
    return (REPOSITORY / "docs" / "support.jsonl").resolve()


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_name(options: argparse.Namespace) -> str:
    """Return the name of the GPUs, asked in another process, or that of the processor's architecture."""
    if options.device == "cpu":
        return f"CPU ({platform.machine()})"
    code = "import torch; print(torch.cuda.get_device_name())"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    return f"{options.gpus} x {name}"


def versions() -> str:
    """Return the versions of the packages of this environment that compute or sample, without their imports."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """Return the short name of HEAD, with a + where files have changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return os.environ.get("SELFDISTILL_COMMIT", "unknown")
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
