# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs stages one after the other, each in a process of its own with a limit; prints their lines as they come."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.gpu import results
from tests.gpu.results import FAILED, Result

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """A command, its limit, and the checks that it must report."""

    name: str
    command: Sequence[str]
    limit_s: float
    """Seconds; what earlier stages have left of theirs is added."""
    checks: Sequence[str]
    """A check that the command does not report has failed."""
    environment: dict[str, str] = field(default_factory=dict)


def run_stages(
    stages: Sequence[Stage],
    say: Callable[[str], None] = print,
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Run every stage, also after failures; return all results in the order of the stages.

    The stages together take at most the sum of their limits.  ``keep`` gets the results of a stage as soon as it ends.
    """
    found: list[Result] = []
    saved = 0.0
    for stage in stages:
        began = time.monotonic()
        of_stage = run_stage(stage, stage.limit_s + saved, say)
        keep(of_stage)
        found += of_stage
        saved = max(0.0, saved + stage.limit_s - (time.monotonic() - began))
    return found


def run_stage(stage: Stage, limit_s: float, say: Callable[[str], None] = print) -> list[Result]:
    """Run one stage, kill all its processes at ``limit_s``, and return a result for each of its checks at least."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="selfdistill_gpu_") as directory:
        path = Path(directory) / "results.jsonl"
        told = {results.VARIABLE: str(path), results.DEADLINE: str(time.time() + limit_s)}
        why, _ = run_process(stage, limit_s, say, told)
        found = results.read(path)
    reported = {result.check for result in found}
    for check in stage.checks:
        if check not in reported:
            note = f"{why} before this check was reported" if why else "the stage ended without a word about this check"
            found.append(Result(check, "", None, "", FAILED, note))
    failed = sorted({result.check for result in found if result.verdict == FAILED})
    summary = f"failed: {', '.join(failed)}" if failed else "ok"
    say(f"[{stage.name}] {summary}; {time.monotonic() - began:.0f} s")
    return found


def run_process(
    stage: Stage, limit_s: float, say: Callable[[str], None], environment: dict[str, str] | None = None
) -> tuple[str, list[str]]:
    """Run a stage's command in a new session and kill it after ``limit_s``; ``say`` prints its lines as they come.

    Returns: what went wrong, empty where it ended with status 0, and its lines of standard output and error.
    """
    began, lines = time.monotonic(), []
    say(f"[{stage.name}] begins; limit {limit_s:.0f} s")
    inherited = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": import_paths()}
    process = subprocess.Popen(
        stage.command,
        cwd=REPOSITORY,
        env={"PYTHONWARNINGS": "ignore"} | inherited | stage.environment | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def forward() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            say(f"[{stage.name} {time.monotonic() - began:5.1f}] {lines[-1]}")

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    why = ""
    try:
        status = process.wait(timeout=limit_s)
        if status:
            why = f"the stage ended with status {status}" if status > 0 else f"the stage was killed by signal {-status}"
    except subprocess.TimeoutExpired:
        why = f"the stage was killed at its limit of {limit_s:.0f} s"
    finally:
        kill(process)
    reader.join(5.0)
    return why, lines


def import_paths(*others: Path) -> str:
    """Return PYTHONPATH with the repository, the modules of its tests and ``others`` before the caller's paths."""
    paths = [REPOSITORY / "tests" / "support", REPOSITORY, *others, os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, map(str, paths)))


def launched(
    script: list[str], num_ranks: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
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


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a stage's session and every descendant, those in sessions of their own (torchrun's ranks) included."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(found: Sequence[Result], rows: dict[str, list[str]], where: dict[str, str]) -> str:
    """Return a table of (README row, check, figure, bound, verdict, device, date, commit).

    ``rows``: of each check the rows of README's support table that need it.  ``where``: device, date and commit.
    """
    heading = ("README row", "check", "figure", "value", "bound", "verdict", "device", "date", "commit")
    cells = [heading]
    for result in found:
        value = "" if result.value is None else f"{result.value:.3g}"
        row = "; ".join(rows.get(result.check, [])) or "-"
        what = result.figure or result.note
        place = (where["device"], where["date"], where["commit"])
        cells.append((row, result.check, what, value, result.bound, result.verdict, *place))
    most = [min(48, max(len(line[i]) for line in cells)) for i in range(len(heading))]
    shown = []
    for line in cells:
        cut = [cell if len(cell) <= most[i] else cell[: most[i] - 1] + "…" for i, cell in enumerate(line)]
        shown.append("  ".join(cell.ljust(most[i]) for i, cell in enumerate(cut)).rstrip())
    notes = [f"  {r.check}: {r.note}" for r in found if r.note and r.figure == "" and len(r.note) > 48]
    return "\n".join([*shown, *(["", "in full:", *notes] if notes else [])])
