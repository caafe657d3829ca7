# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the loss, training steps and sampling on a GPU, and write results_gpu.md beside it: ``make bench-gpu``.

    python tools/benchmarks/on_gpu.py                           one GPU, at most nine minutes
    python tools/benchmarks/on_gpu.py --gpus 8                  also five steps of the recipe qwen3_8b, on eight GPUs
    python tools/benchmarks/on_gpu.py --device cpu --out FILE   reduced sizes, to another file

Each measurement is a script of tools/ in a process of its own with a limit.  A measurement that fails is a line of the
page, and the next measurement follows.  The script ends with 1 where a measurement has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support"):
    if str(_directory) not in sys.path:
        sys.path.append(str(_directory))

import children  # noqa: E402
import hidden_gpus  # noqa: E402

PAGE = REPOSITORY / "tools" / "benchmarks" / "results_gpu.md"
_CPU_PATIENCE = 6
NOTHING_YET = "Nothing has been measured on a GPU yet."
INTRODUCTION = """# Benchmarks on GPUs

`make bench-gpu` writes this page.  [benchmarks.md](../../docs/benchmarks.md) has the figures of a CPU.
The floor of the loss is the time of its seven reads and writes of all logits at the speed of a copy in the same run.
"""


@dataclass(frozen=True)
class Measurement:
    """A section of the page: a script's own table."""

    title: str
    script: str
    arguments: Sequence[str]
    limit_s: float

    @property
    def shown_command(self) -> str:
        """The command as the page shows it."""
        return " ".join(["python", self.script, *self.arguments])

    @property
    def command(self) -> list[str]:
        """The command that is run, with this Python."""
        return [sys.executable, self.script, *self.arguments]


@dataclass(frozen=True)
class Measured:
    """A measurement with the lines of Markdown that its script has printed, and why it has failed, if it has."""

    measurement: Measurement
    markdown: list[str]
    failure: str


def measurements(on_gpu: bool, gpus: int) -> list[Measurement]:
    """Return what is measured, in the order of the page; at most nine minutes on one GPU."""
    columns = ["151936", "18992"] if on_gpu else ["256"]
    tokens = ["16384", "4096"] if on_gpu else ["64"]
    hidden, repeats = ("4096", "5") if on_gpu else ("32", "1")
    found = []
    for source in ([], ["--hidden", hidden]):
        for count in tokens:
            found.append(
                Measurement(
                    f"The loss of {count} tokens from {'hidden states' if source else 'logits'}",
                    "tools/benchmarks/loss_time.py",
                    ["--tokens", count, "--vocab", *columns, "--repeats", repeats, *source],
                    limit_s=55,
                )
            )
    large = "--layers 16 --hidden 2048 --head-size 128 --vocab 151936 --tokens 8192 --repeats 2 --fused keep_gradient"
    small = "--layers 1 --hidden 64 --head-size 32 --vocab 256 --problems 3 --response 16 --tokens 256 --repeats 1"
    step = f"{large} --problems 16 --prompt 256 --hint 256 --response 256" if on_gpu else small
    found.append(
        Measurement(
            "A training step with and without the teacher, and sampling in process: "
            + ("1.7e9 parameters" if on_gpu else "a tiny model"),
            "tools/benchmarks/step_time.py",
            step.split(),
            limit_s=200,
        )
    )
    decoded = "--layers 16 --hidden 2048 --vocab 151936 --batch 16 --prompt 256 --new-tokens 64 --repeats 2"
    tiny = "--layers 1 --hidden 64 --vocab 256 --batch 3 --prompt 8 --new-tokens 8 --repeats 1"
    found.append(
        Measurement(
            "Decoding in process, kernel by kernel and from CUDA graphs",
            "tools/benchmarks/rollout_time.py",
            ["--no-vllm", *(decoded if on_gpu else tiny).split()],
            limit_s=60,
        )
    )
    recipe = "tools/benchmarks/recipe_steps.py"
    if gpus == 8:
        title = "recipe=qwen3_8b with random weights, eight GPUs"
        found.append(Measurement(title, recipe, ["--recipe", "qwen3_8b", "--steps", "5"], limit_s=660))
    if not on_gpu:
        found.append(Measurement("Steps of a tiny run", recipe, ["--tiny", "--steps", "3"], limit_s=120))
    # Nobody waits for a GPU there, and a machine with other work takes much longer to import torch.
    return found if on_gpu else [replace(one, limit_s=_CPU_PATIENCE * one.limit_s) for one in found]


def measured(one: Measurement, limit_s: float) -> Measured:
    """Run a measurement and keep the Markdown of its output: its tables and the line above each."""
    environment = {} if os.environ.get(hidden_gpus.VARIABLE) != "" else {"TORCHDYNAMO_DISABLE": "1"}
    try:
        status, output = children.run(one.command, environment, limit_s)
    except subprocess.TimeoutExpired:
        return Measured(one, [], f"the script was killed at its limit of {limit_s:.0f} s")
    markdown = tables(output.splitlines())
    failure = f"the script ended with {status}" if status else "" if markdown else "the script has printed no table"
    return Measured(one, markdown, failure)


def tables(lines: Sequence[str]) -> list[str]:
    """Return the Markdown tables of a script's output, each with the last line of text before it."""
    found: list[str] = []
    text = ""
    for line in lines:
        if line.startswith("|"):
            if not found or not found[-1].startswith("|"):
                found += [text, ""] if text else []
            found.append(line)
            text = ""
        elif found and found[-1].startswith("|"):
            found.append("")
            text = line
        elif line.strip():
            text = line
    return [line for i, line in enumerate(found) if line or (i and found[i - 1])]


def page(found: Sequence[Measured], where: dict[str, str] | None) -> str:
    """Return the whole page; without ``where`` it says that nothing has been measured."""
    if where is None:
        return f"{INTRODUCTION}\n{NOTHING_YET}\n"
    lines = [INTRODUCTION, f"{where['machine']}; {where['date']}, commit {where['commit']}.", ""]
    for one in found:
        lines += [f"## {one.measurement.title}", "", f"`{one.measurement.shown_command}`", ""]
        lines += [*one.markdown, ""] if one.markdown else []
        lines += [f"This measurement failed: {one.failure}.", ""] if one.failure else []
    return "\n".join(lines).rstrip() + "\n"


def commit() -> str:
    """Return the short name of HEAD, with a + where files have changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page after each measurement, and return 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, choices=(1, 8), default=1)
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {PAGE.relative_to(REPOSITORY)}, with a GPU")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not hidden_gpus.number(os.environ.get(hidden_gpus.VARIABLE)):
        print("expected an NVIDIA GPU and a torch with CUDA, found none; on a CPU use --device cpu", file=sys.stderr)
        return 1
    if not on_gpu:
        os.environ |= {hidden_gpus.VARIABLE: "", "OMP_NUM_THREADS": "1"}
    out = options.out or (PAGE if on_gpu else Path(tempfile.mkdtemp(prefix="selfdistill_bench_")) / PAGE.name)
    where = {"machine": hidden_gpus.described(on_gpu), "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
    found: list[Measured] = []
    saved = 0.0
    for one in measurements(on_gpu, options.gpus if on_gpu else 1):
        began = time.monotonic()
        found.append(measured(one, one.limit_s + saved))
        saved = max(0.0, saved + one.limit_s - (time.monotonic() - began))
        out.write_text(page(found, where), encoding="utf-8")
    failed = [one.measurement.title for one in found if one.failure]
    print(f"wrote {out}" + (f"; failed: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
