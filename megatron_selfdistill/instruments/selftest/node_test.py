# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-test of a launch: its ranks compute every proof, and rank 0 prints a line for each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_world
from megatron_selfdistill.distributed import ranks, roll_call, watchdog
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.signs_of_life import entered
from megatron_selfdistill.instruments.selftest.proofs import (
    Launch,
    WorstError,
    all_ranks_meet,
    sharded_loss,
    tiny_model,
    training_step,
)

PROOFS: dict[str, Callable[[Launch, Config], WorstError]] = {
    "all ranks meet": all_ranks_meet,
    "the vocabulary-sharded loss equals the unsharded one": sharded_loss,
    "a training step in the layout equals the step of one rank": training_step,
}
"""The proofs, each of which leaves a process group of all ranks open."""


def selftest(overrides: Sequence[str] = (), *, limit_s: float = 180.0) -> dict[str, WorstError]:
    """Compute every proof and return its report, equal on all ranks; rank 0 prints a line for each proof.

    ``overrides``: the layout, as keys of ``parallel``.  torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
    without these variables the world is one rank.  No process group may exist.  ``limit_s``: the seconds without
    progress, compilers included, after which the watchdog names the rank that hangs and ends the launch.
    Raises: `ConfigError` for keys or a layout that cannot be.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), roll_call.world_size()
    config = tiny_model(overrides, world_size)
    check_world(config, world_size)
    if not cpu.ON_CPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = "cpu, over gloo" if cpu.ON_CPU else f"{torch.cuda.get_device_name()}, over NCCL"
    if rank == 0:
        print(f"self-test: {world_size} rank{'s' * (world_size > 1)}, {device}")
    store = roll_call.launch_store("selfdistill/selftest", world_size, limit_s + 60, may_keep=rank == 0)
    launch, reports = Launch(rank, world_size, store, limit_s), dict[str, WorstError]()
    stacks = Path(tempfile.gettempdir(), f"selfdistill_selftest_{os.environ.get('MASTER_PORT', os.getpid())}", "stacks")
    with watchdog.watched(rank, world_size, stacks, limit_s):
        for name, proof in PROOFS.items():
            entered(name)
            reports[name] = report = WorstError.worst(gather_objects(proof(launch, config)))
            ranks.shutdown()
            if rank == 0:
                verdict = "ok     " if report.holds else "FAILURE"
                print(f"{verdict}  {name}: {report.error:.2g} of the allowed error ({report.case})", flush=True)
    return reports
