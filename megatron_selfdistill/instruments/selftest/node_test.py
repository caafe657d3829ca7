# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-test of a node: the ranks of this launch run every check, print a table and return one exit status.

torchrun --nproc-per-node 8 -m megatron_selfdistill doctor --selftest
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.distributed import ranks, roll_call
from megatron_selfdistill.instruments.selftest.launch_environment import set_environment
from megatron_selfdistill.instruments.selftest.meeting import LIMIT_S, Meeting
from megatron_selfdistill.instruments.selftest.outcome import HEADER, Outcome, lines
from megatron_selfdistill.instruments.selftest.sharded_loss import loss_against_float64
from megatron_selfdistill.instruments.selftest.tiny import LaunchUnderTest, write_texts
from megatron_selfdistill.instruments.selftest.training import (
    identity_law,
    layers_against_local,
    pair_orders,
    save_and_resume,
    warm_up,
    weight_sync,
)
from megatron_selfdistill.model.architecture import uses_transformer_engine
from megatron_selfdistill.model.build import megatron_in_use

CHECKS: dict[str, Callable[[LaunchUnderTest], Outcome]] = {
    "identity law": identity_law,
    "vocabulary-parallel loss against float64": loss_against_float64,
    "Transformer Engine's layers against local ones": layers_against_local,
    "both pair orders": pair_orders,
    "save and resume": save_and_resume,
    "weight sync to the sampler": weight_sync,
}
SHARE = 0.5
"""The part of the remaining time that one check may take; the last check, which waits for an engine, gets all of it."""


def selftest(sampler: str | None = None, say: Callable[[str], None] = print, limit_s: float = LIMIT_S) -> list[Outcome]:
    """Run every check and return the outcomes, equal on all ranks; rank 0 passes each outcome to ``say`` at once.

    ``sampler``: megatron or vllm; None is vllm where vLLM is installed, else megatron.  torchrun sets RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT; without these variables the world is one rank.  No process group may exist.  A warm-up
    of at most ``limit_s`` comes first, so that the first start of NCCL and of the compilers counts for no check.  If
    ranks do not return from the warm-up or from a check, or if ``limit_s`` are over, the process ends here with status
    1 and a complete table, in which the checks that were not reached have lines too.
    """
    set_environment()
    rank, world_size = int(os.environ.get("RANK", "0")), roll_call.world_size()
    sampler = sampler or ("vllm" if importlib.util.find_spec("vllm") else "megatron")
    if not cpu.ON_CPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    table = _Table(say if rank == 0 else lambda line: None)
    with Meeting(rank, world_size, broken_off=table.end, limit_s=limit_s) as meeting:
        table.begin(world_size, sampler)
        with _directory(meeting) as directory:
            launch = LaunchUnderTest(rank, world_size, directory, sampler, meeting.open_group, 2 * limit_s)
            table.warmed(meeting.warm_up(partial(warm_up, launch), leave=_leave, limit_s=limit_s))
            for number, (name, check) in enumerate(CHECKS.items(), 1):
                share = SHARE if number < len(CHECKS) else 1.0
                table.add(meeting.hold(name, partial(check, launch), leave=_leave, share=share))
    table.conclude()
    return table.outcomes


def passed(outcomes: list[Outcome]) -> bool:
    """Return whether every check has passed."""
    return len(outcomes) == len(CHECKS) and all(outcome.passed for outcome in outcomes)


class _Table:
    """The table of outcomes, printed line by line, so that a process that is killed has printed the lines before."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.outcomes: list[Outcome] = []
        self._say, self._began = say, time.perf_counter()

    def begin(self, world_size: int, sampler: str) -> None:
        """Print the header."""
        device = "cpu, over gloo" if cpu.ON_CPU else f"{torch.cuda.get_device_name()}, over NCCL"
        layers = "Transformer Engine's" if uses_transformer_engine() else "Megatron's local"
        self._say(f"self-test: {world_size} rank{'s' * (world_size > 1)}, {device}; {layers} layers; sampler {sampler}")
        self._say(megatron_in_use())
        self._say(HEADER)

    def warmed(self, outcome: Outcome) -> None:
        """Print how long the warm-up took, and why it was broken off if it was."""
        self._say(f"{outcome.name:<58} {'':>9}    {'':>7} {outcome.seconds:>8.1f}")
        if outcome.error:
            self._say(f"    -> {outcome.error}")

    def add(self, outcome: Outcome) -> None:
        """Print the lines of one outcome."""
        self.outcomes.append(outcome)
        for line in lines(outcome):
            self._say(line)

    def end(self, outcome: Outcome) -> None:
        """Print the outcome of a check from which some ranks have not returned; no name: the time is over."""
        why = "the check before was broken off" if outcome.name else outcome.error
        if outcome.name and outcome.name not in CHECKS:
            self.warmed(outcome)
            why = "the warm-up was broken off"
        elif outcome.name:
            self.add(outcome)
        for name in list(CHECKS)[len(self.outcomes) :]:
            self.add(Outcome(error=f"not reached: {why}", name=name))
        self.conclude()

    def conclude(self) -> None:
        """Print the verdict on the node."""
        failures = [outcome.name for outcome in self.outcomes if not outcome.passed]
        skipped = [outcome.name for outcome in self.outcomes if outcome.passed and outcome.not_done]
        seconds = time.perf_counter() - self._began
        if failures:
            self._say(f"{len(failures)} of {len(CHECKS)} checks failed in {seconds:.0f} s: {'; '.join(failures)}")
            return
        but = f"; not done: {'; '.join(skipped)}" if skipped else ""
        self._say(f"this node passes, {len(CHECKS) - len(skipped)} of {len(CHECKS)} checks, in {seconds:.0f} s{but}")


@contextlib.contextmanager
def _directory(meeting: Meeting) -> Iterator[Path]:
    """Yield a directory with texts that rank 0 makes for all ranks; it is removed when all ranks have left."""
    made: list[Path] = []

    def make() -> str:
        made.append(Path(tempfile.mkdtemp(prefix="selfdistill_selftest_")))
        write_texts(made[0])
        return str(made[0])

    try:
        yield Path(meeting.from_rank_0("directory", make))
    finally:
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)


def _leave() -> None:
    """End the process groups of a check, even of a check that was broken off, and free their memory."""
    ranks.shutdown()
    gc.collect()
    if not cpu.ON_CPU:
        torch.cuda.empty_cache()
