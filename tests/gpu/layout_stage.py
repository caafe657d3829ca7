# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: training steps in layouts on the device, each against one CPU rank.

python -m tests.gpu.layout_stage GROUP BACKEND [--names NAME ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import layouts
import torch

from megatron_selfdistill.commands.installation import is_installed
from megatron_selfdistill.errors import ConfigError
from tests.gpu import cases
from tests.gpu.layout_rank import file_name
from tests.gpu.results import Figure, Outcome, held, report, seconds_left

# Another device sums float32 values in another order, and the last bits of its exponentials differ.
ON_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
BOUND = 1e-4 if ON_GPU else 1e-5
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("group", choices=sorted(cases.GROUPS))
    parser.add_argument("backend", choices=("staged", "nccl"))
    parser.add_argument("--names", nargs="*", help="these cases only")
    options = parser.parse_args()
    group = cases.GROUPS[options.group]
    skipped = {name: why for name in options.names or group if (why := lacking(group[name]))}
    for name, why in skipped.items():
        report(f"{options.group}: {name}", Outcome(not_done=why))
    names = [name for name in options.names or group if name not in skipped]
    deadline = time.monotonic() + seconds_left()
    with tempfile.TemporaryDirectory(prefix="selfdistill_layouts_") as path:
        directory = Path(path)
        same = references(options.group, names)
        reference = start(
            options.group, "gloo", 1, directory, [f"reference/{name}" for name in set(same.values())], NO_GPU
        )
        sizes = sorted({group[name].world_size for name in names})
        failures: dict[str, str] = {}
        for size in sizes:
            failures |= run_all(
                options.group,
                options.backend,
                size,
                directory,
                [n for n in names if group[n].world_size == size],
                deadline,
            )
        finish(reference, directory, deadline)
        sound = [
            held(f"{options.group}: {name}", partial(compared, group[name], name, same[name], directory, failures))
            for name in names
        ]
    return 0 if all(sound) else 1


def lacking(one: cases.Compared) -> str:
    """Return why a case cannot run here; empty where it can."""
    if one.needs and not ON_GPU:
        return f"the kernels of {one.needs[0]} need an NVIDIA GPU, and this is a CPU"
    absent = [module for module in one.needs if not is_installed(module)]
    if absent:
        return f"this environment has no {' and no '.join(absent)}"
    return refused_kernels() if cases.LINEAR in one.needs else ""


def refused_kernels() -> str:
    """Return why a run on this GPU is refused the installed flash-linear-attention; empty where it has it."""
    from megatron_selfdistill.architectures.gated_delta_net import installed_kernels

    try:
        installed_kernels()
    except ConfigError as error:
        return str(error)
    return ""


def references(group: str, names: Sequence[str]) -> dict[str, str]:
    """Return of each case the first one that has the same reference."""
    first: dict[str, str] = {}
    return {name: first.setdefault(repr(cases.GROUPS[group][name].reference), name) for name in names}


def start(
    group: str,
    backend: str,
    world_size: int,
    directory: Path,
    names: Sequence[str],
    environment: dict[str, str] | None = None,
) -> list[subprocess.Popen]:
    """Start the ranks of ``names``, each of which writes its output to a file of its own."""
    processes = []
    for rank in range(world_size):
        command = [
            sys.executable,
            "-m",
            "tests.gpu.layout_rank",
            group,
            backend,
            str(rank),
            str(world_size),
            str(directory),
            *names,
        ]
        with (directory / f"log {backend} {world_size} {rank}").open("w") as log:
            processes.append(
                subprocess.Popen(command, env=os.environ | (environment or {}), stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def run_all(group: str, backend: str, size: int, directory: Path, names: list[str], deadline: float) -> dict[str, str]:
    """Run every case of one world size and return the reason for each case that failed.

    After a failure, new ranks start with the cases that follow.
    """
    failures: dict[str, str] = {}
    left = list(names)
    while left:
        why = wait(start(group, backend, size, directory, left), deadline)
        left = [name for name in left if not all((directory / file_name(name, r)).exists() for r in range(size))]
        if not left:
            break
        failed = left.pop(0)
        log = (directory / f"log {backend} {size} {why[1]}").read_text(errors="replace")
        print(f"--- {failed}, rank {why[1]}:\n{log[-3000:]}", flush=True)
        failures[failed] = f"{why[0]}: {(log.strip().splitlines() or ['no output'])[-1][:200]}"
        if time.monotonic() > deadline:
            return failures | dict.fromkeys(left, "not reached within the limit")
        for file in directory.glob(f"store {group} {backend} {size} *"):
            file.unlink()
    return failures


def wait(processes: Sequence[subprocess.Popen], deadline: float) -> tuple[str, int]:
    """Wait until all have ended, one has failed or the time is over; end them all; return what happened, and where."""
    why = ("", 0)
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            late = next((rank for rank, process in enumerate(processes) if process.poll() is None), 0)
            why = ("failed", failed[0]) if failed else ("did not end within the limit", late)
            break
        time.sleep(0.1)
    else:
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        why = ("failed", failed[0]) if failed else why
    for process in processes:
        process.kill()
        process.wait()
    return why


def finish(reference: Sequence[subprocess.Popen], directory: Path, deadline: float) -> None:
    """Wait for the references; a failure is printed, and each case that lacks its reference fails."""
    if wait(reference, deadline)[0]:
        print(f"--- references:\n{(directory / 'log gloo 1 0').read_text(errors='replace')[-3000:]}", flush=True)


def compared(one: cases.Compared, name: str, reference: str, directory: Path, failures: dict[str, str]) -> Outcome:
    """Compare the gradients, or the changes of the parameters, and the loss with those of the reference."""
    if name in failures:
        return Outcome(error=failures[name])
    if not (directory / file_name(f"reference/{reference}", 0)).exists():
        return Outcome(error="the reference on one CPU rank did not end within the limit, or failed: see above")
    ranks = [torch.load(directory / file_name(name, rank), weights_only=False) for rank in range(one.world_size)]
    expected = torch.load(directory / file_name(f"reference/{reference}", 0), weights_only=False)
    losses = {loss for loss, _, _ in ranks}
    index, bound = (2, cases.PARAMETER_BOUND) if one.parameters else (1, one.bound or BOUND)
    own = layouts.join([rank[index] for rank in ranks])
    right = layouts.join([expected[index]])
    if one.parameters:
        own, right = ({k: v - initial(k, v) for k, v in tensors.items()} for tensors in (own, right))
    own = {key: tensor.float() for key, tensor in own.items()}
    worst, where = layouts.worst_difference(own, right)
    smallest = min(float(tensor.norm()) for tensor in right.values())
    off = max(abs(loss - expected[0]) / expected[0] for loss in losses)
    return Outcome(
        (
            Figure(
                "changes of parameters" if one.parameters else "gradients, relative difference",
                worst,
                bound,
                where=where,
            ),
            Figure("loss, relative difference", off, cases.BF16_LOSS_BOUND if one.bound else BOUND),
            Figure("the loss itself, nats per token", expected[0], 0.05, at_least=True),
            Figure("smallest norm that was compared", smallest, 1e-12, at_least=True),
        )
    )


def initial(key: str, like: torch.Tensor) -> torch.Tensor:
    return layouts.models.full_weight(key, like.shape)


if __name__ == "__main__":
    sys.exit(main())
