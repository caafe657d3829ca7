# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Train a Megatron model on its own responses, towards what it would have said had it known the solution.

selfdistill train data.path=problems.jsonl data.tokenizer=DIR checkpoint.load=DIR run_dir=runs/first
torchrun --nproc-per-node 8 -m megatron_selfdistill.train parallel=node_of_8 ...
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill import config as configuration
from megatron_selfdistill import prechecks
from megatron_selfdistill.checkpoint.run.run_lock import LOCK, RunLock
from megatron_selfdistill.compat.known_warnings import silence_known_warnings
from megatron_selfdistill.config import Config, ConfigError, check_files, command_line
from megatron_selfdistill.distributed import stop, watchdog
from megatron_selfdistill.distributed.roll_call import OtherRankFailed, RollCall
from megatron_selfdistill.errors import CheckpointError, EngineError
from megatron_selfdistill.plan import plan_checks
from megatron_selfdistill.report import next_steps

if TYPE_CHECKING:
    from megatron_selfdistill.run import Run
    from megatron_selfdistill.run_data import RunData

EXIT_BAD_INPUT, EXIT_UNHEALTHY, EXIT_NO_ROLLOUT = 2, 3, 4


@stop.listening()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 for a run that is complete or that stopped when asked (stop.py),
    2 for bad input, 3 where a guard stopped the run, 4 where responses could not be had, 130 for Ctrl-C outside of a
    run or pressed twice.  A run that hangs exits with 5 (watchdog.py)."""
    ranks = RollCall()
    try:
        return _command(command_line.parse(argv), ranks)
    except OtherRankFailed as elsewhere:
        ranks.tell_torchrun(str(elsewhere))
        return elsewhere.status
    except (ConfigError, CheckpointError, EngineError) as error:
        status = EXIT_NO_ROLLOUT if isinstance(error, EngineError) else EXIT_BAD_INPUT
        _report(configuration.hidden(str(error)), status, ranks)
        return status
    except KeyboardInterrupt:
        return stop.EXIT_INTERRUPTED
    except Exception as error:
        ranks.failed(repr(error), 1)  # the others need not wait; Python prints the traceback
        raise
    finally:
        ranks.leave()


def _command(arguments: argparse.Namespace, ranks: RollCall) -> int:
    if arguments.about is not None:
        print(arguments.about())
        return 0
    config = configuration.load(arguments.overrides, arguments.config_name, arguments.config_dir)
    if arguments.print:
        print(configuration.to_yaml(config))
        return 0
    given = configuration.given_keys(arguments.overrides, arguments.config_name, arguments.config_dir)
    if config.dry_run and config.cluster.num_gpus is not None and "RANK" not in os.environ:
        return plan(config, given, arguments.argv)
    with stop.interruptible():
        return train(config, given, ranks)


def _report(sentence: str, status: int, ranks: RollCall) -> None:
    """Print why this rank ends, unless another rank prints the same sentence."""
    if ranks.failed(sentence, status):
        print(f"[rank {ranks.rank}] {sentence}", file=sys.stderr, flush=True)
        ranks.tell_torchrun(sentence)
    else:
        ranks.tell_torchrun("the same as on the rank that has printed its error")


def train(config: Config, given: Collection[str] | None = None, ranks: RollCall | None = None) -> int:
    """The whole run: check, build, loop.  Returns 0, also where the run was asked to stop, or, with a checkpoint to go
    on from, `EXIT_UNHEALTHY` where a guard stopped it and `EXIT_NO_ROLLOUT` where an engine failed.

    ``given``: the keys that somebody set, which must not contradict the checkpoint that the run starts from; null: all
    that are not at their defaults.  ``ranks``: through which the ranks meet; on an error the caller tells them.
    Raises `ConfigError` for bad input: what can be seen without other ranks is seen before they are met.
    """
    check_files(config)
    ranks, lock = ranks or RollCall(), RunLock(Path(config.run_dir))
    prechecks.require_ranks(config, ranks.world_size)
    prechecks.require_lengths(config)
    prechecks.require_data(config)
    prechecks.require_start(config)
    with stop.at_sudden_end(lock.release):
        try:
            if ranks.rank == 0 and not config.dry_run:
                lock.acquire()
            return _check_and_train(config, given, ranks, lock)
        finally:
            lock.release()


def _check_and_train(config: Config, given: Collection[str] | None, ranks: RollCall, lock: RunLock) -> int:
    silence_known_warnings()
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.run.resumption import refuse_another_run
    from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
    from megatron_selfdistill.run_data import RunData

    refuse_another_run(config, given)
    as_given, config = config, with_stored_architecture(config, given)
    require_same_tokenizer(config)
    config.check_world(ranks.world_size)
    patience_s = config.parallel.distributed_timeout_minutes * 60
    finished = _finished(config, as_given) if ranks.rank == 0 else None
    if checkpoint := ranks.answer("folder", str(finished or ""), patience_s):
        return _already_complete(config, Path(checkpoint), ranks)
    run_data = RunData.load(config)
    ranks.answer("inputs", timeout_s=patience_s)
    return _train(config, run_data, None if config.dry_run else lock.renew)


def _train(config: Config, run_data: RunData, prove_ownership: Callable[[], None] | None) -> int:
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.metrics.guards import RunUnhealthy
    from megatron_selfdistill.run import Run

    rollout = config.rollout
    by_ipc = rollout.engine == "vllm" and rollout.placement == "server" and rollout.transfer in (None, "ipc")
    grid = ranks.initialize(config.parallel, config.seed, shares_memory=by_ipc)
    try:
        stacks = Path(config.run_dir) / ("stacks_of_dry_run" if config.dry_run else "stacks")
        with watchdog.watched(grid.rank, grid.world_size, stacks, config.hang_timeout_s):
            with watchdog.moving_files():
                run = Run(config, run_data, grid, prove_ownership)
            try:
                _announce(run)
                if not config.dry_run:
                    first, began = run.step, time.monotonic()
                    loop(run)
                    _conclude(run, first, time.monotonic() - began)
                return 0
            except (RunUnhealthy, EngineError) as reason:
                if isinstance(reason, EngineError) and run.stop.agreed():
                    run.leave()  # who ended this job ended its servers too
                    return 0
                run.save()
                run.log.message(f"stopped: {reason}")
                return EXIT_UNHEALTHY if isinstance(reason, RunUnhealthy) else EXIT_NO_ROLLOUT
            finally:
                run.close()
    finally:
        ranks.shutdown()


def _finished(config: Config, as_given: Config) -> Path | None:
    """Return the last checkpoint of a run that is complete, and was last started with the configuration ``as_given``;
    ``config``: the same with the architecture of that checkpoint.  None for any other run."""
    from megatron_selfdistill.checkpoint import directory
    from megatron_selfdistill.checkpoint.run.run_directory import CONFIGURATION_FILE

    run_dir = Path(config.run_dir)
    written = run_dir / CONFIGURATION_FILE
    if config.dry_run or not config.checkpoint.resume or not written.is_file():
        return None
    # Its first launch wrote it before there was a checkpoint with an architecture, the others after that.
    if written.read_text(encoding="utf-8") not in map(configuration.to_yaml, (as_given, config)):
        return None  # the run itself judges what differs
    latest = directory.latest(run_dir / "checkpoints")
    if latest is None or directory.iteration_of(latest) < config.num_steps:
        return None
    return None if directory.incomplete(latest) or directory.unverifiable(latest) else latest


def _already_complete(config: Config, checkpoint: Path, ranks: RollCall) -> int:
    if ranks.rank == 0:
        lines = next_steps.complete(Path(config.run_dir), config.num_steps, checkpoint)
        print(configuration.hidden("\n".join(lines)), flush=True)
    return 0


def plan(config: Config, given: Collection[str] | None, arguments: Sequence[str]) -> int:
    """``dry_run=true`` without a launch: print what the run will need on ``cluster.num_gpus`` GPUs, and how to launch
    it.  Raises `ConfigError` for what cannot run, and after the tables for what does not fit."""
    plan_checks.check_plan(config)
    if config.data.path and config.data.tokenizer:  # else the plan reads neither
        prechecks.require_data(config)
    prechecks.require_start(config)
    silence_known_warnings()
    from megatron_selfdistill.plan.dry_run import dry_run
    from megatron_selfdistill.plan.plan_tables import show

    planned = dry_run(config, given)
    show(planned, arguments)
    misfit = planned.misfit()
    if misfit is not None:
        raise ConfigError(misfit)
    return 0


def loop(run: Run) -> None:
    """The algorithm."""
    if run.step == 0 and run.config.evaluation.at_start:
        run.evaluate()
    while run.step < run.config.num_steps and not run.stop.agreed():
        problems = run.next_problems()
        responses = run.generate(problems)  # on-policy: the current weights
        batch = run.pack(problems, responses)  # the same responses behind two prompts
        output = run.forward_backward(batch)  # teacher and student in one pipeline schedule
        metrics = run.update(output)
        run.finish_step(metrics, responses, batch)
    if run.step < run.config.num_steps:
        run.leave()  # a signal, or the end of its time


def _announce(run: Run) -> None:
    """Write the resolved configuration into the run folder, unless this is a dry run, and say what will run."""
    from megatron_selfdistill.data.packing import length_quantum
    from megatron_selfdistill.distributed.ranks import about_allocator
    from megatron_selfdistill.logged import LEFT_OUT_FILE, list_left_out
    from megatron_selfdistill.model.architecture import uses_transformer_engine
    from megatron_selfdistill.model.build import megatron_in_use, unwrapped
    from megatron_selfdistill.model.fused_kernels import kernels_in_use

    if not run.grid.is_reporter:
        return
    memory = []
    if run.grid.device.type == "cuda":
        quantum = length_quantum(run.config.schedule.max_tokens)
        memory = [f"GPU memory: {about_allocator(os.environ)}; packed rows of multiples of {quantum} tokens"]
    grid, counts = run.grid, run.run_data.counts
    folder = run.folder.path
    if not run.config.dry_run:
        run.folder.write()
    layers = "Transformer Engine" if uses_transformer_engine() else "Megatron's local spec"
    vpp = f" (VPP {grid.virtual_pipeline_model_parallel_size})" if grid.virtual_pipeline_model_parallel_size else ""
    data = f"{len(run.run_data.problems)} {'turns' if run.run_data.about_conversations else 'problems'} "
    if run.config.logged:
        data += f"(what cannot be used is left out when it comes up, and listed in {folder / LEFT_OUT_FILE})"
    else:
        data += (
            f"({counts.truncated} with a shortened solution; left out: {counts.dropped} too long, "
            f"{run.run_data.problems.num_skipped} bad)"
        )
    start = run.config.checkpoint.load or "random weights"
    start = f"resumes {run.resumed_from}" if run.resumed_from else f"starts from {start}"
    for line in (
        f"{megatron_in_use()}; layers: {layers}; device: {grid.device.type}",
        kernels_in_use(unwrapped(run.chunks[0]).config),
        *memory,
        f"TP {grid.tp_size} x PP {grid.pp_size}{vpp} x CP {grid.cp_size} x DP {grid.dp_size}, EP {grid.ep_size}; "
        f"pair order {run.pair_order}",
        *([f"loss: {run.loss_backend}"] if run.has_teacher else []),
        f"{data}; contexts of at most {run.run_data.max_length} tokens",
        str(run.output_layer),
        *([run.run_data.about_prompts] if run.run_data.about_prompts else []),
        *run.run_data.about_conversations,
        f"{start}, at step {run.step} of {run.config.num_steps}; everything goes to {folder}",
        *run.changes,
        *([run.stop.plan] if run.stop.plan else []),
    ):
        run.log.message(line)
    if run.config.dry_run and (folder / LOCK).exists():
        return  # the list is that of the run that is using the folder
    if run.resumed_from is None:
        (folder / LEFT_OUT_FILE).unlink(missing_ok=True)
    if run.run_data.left_out:
        list_left_out(folder / LEFT_OUT_FILE, run.run_data.left_out)
        run.log.message(f"what was left out, by file and line: {folder / LEFT_OUT_FILE}; {run.run_data.left_out[0]}")


def _conclude(run: Run, first_step: int, seconds: float) -> None:
    """Say what a run that has done its last step made, and what comes next."""
    if run.step < run.config.num_steps:
        return  # it was asked to stop, and has said so
    run.checkpointer.finish()
    run_dir, steps = run.run_dir, run.step - first_step
    if steps > 0:
        lines = next_steps.done(run_dir, run.step, steps, seconds, run.checkpoint)
    else:
        lines = next_steps.complete(run_dir, run.step, run.checkpoint)
    for line in lines:
        run.log.message(line)


if __name__ == "__main__":
    stop.ignore_signals()  # but not in main: torchrun ends all ranks after one of them, and each has a status to keep
    sys.exit(main())
