# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Train a Megatron model on its own responses, towards what the same model predicts when it sees the solution.

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

from megatron_selfdistill.commands.installation import require_extra

require_extra(__name__, "train")  # before the imports that need these packages

from megatron_selfdistill import config as configuration
from megatron_selfdistill.annexes import door
from megatron_selfdistill.checkpoint.run_lock import RunLock
from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer, with_stored_tokenizer
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.config import Config, command_line
from megatron_selfdistill.config.world_checks import check_files, check_world
from megatron_selfdistill.distributed import signs_of_life, stop, watchdog
from megatron_selfdistill.distributed.roll_call import OtherRankFailed, RollCall, launch, speaker
from megatron_selfdistill.distributed.terminal import guard_standard_error, silence_known_warnings, visible
from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, VerifierError

if TYPE_CHECKING:
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.trainer import AccumulatedBatch, Trainer

EXIT_BAD_INPUT, EXIT_UNHEALTHY, EXIT_NO_ROLLOUT = 2, 3, 4


def loop(trainer: Trainer) -> None:
    """Run the algorithm: the loop holds every value of a step, from the responses to the metrics."""
    if trainer.step == 0 and trainer.config.evaluation.at_start:
        trainer.evaluate()
    while trainer.step < trainer.config.num_steps and not trainer.stop.agreed():
        step: list[AccumulatedBatch] = []
        for batch in trainer.batches():  # on-policy responses of the present weights, those of each teacher apart
            balanced = trainer.balance(batch)  # the same responses, equally much work for every replica
            packed = trainer.pack(balanced)  # the same responses conditioned on two prompts
            step.append(trainer.forward_backward(balanced, packed, step))  # all models in one pipeline schedule
        metrics = trainer.update(step)
        trainer.finish_step(step, metrics)
    if trainer.step < trainer.config.num_steps:
        trainer.leave()  # a signal, or the end of its time


@stop.listening()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0: the run is complete, or it stopped when asked (stop.py); 2: bad input; 3: a guard stopped the run; 4: an engine
    returned no responses, or a verifier, reward or hint of the user failed; 130: Ctrl-C outside of a run, or pressed
    twice.  A run that hangs exits with 5 (watchdog.py).
    """
    guard_standard_error()
    ranks = RollCall()
    try:
        return _command(command_line.parse(argv), ranks)
    except OtherRankFailed as elsewhere:
        return elsewhere.status
    except (ConfigError, CheckpointError, EngineError, VerifierError) as error:
        status = EXIT_NO_ROLLOUT if isinstance(error, (EngineError, VerifierError)) else EXIT_BAD_INPUT
        if ranks.failed(message := visible(str(error)), status):  # no other rank prints the same message
            print(f"{speaker()}{message}", file=sys.stderr, flush=True)
        return status
    except KeyboardInterrupt:
        return stop.EXIT_INTERRUPTED
    except Exception as error:
        ranks.failed(repr(error), 1)  # the other ranks need not wait; Python prints the traceback
        raise
    finally:
        ranks.leave()


def _command(arguments: argparse.Namespace, ranks: RollCall) -> int:
    if arguments.about is not None:
        print(arguments.about())
        return 0
    with configuration.user_code("code that this run has called"):  # the status is 0 only where this program returns it
        if named := [word for word in arguments.overrides if word.startswith("model=") and "/" in word]:
            silence_known_warnings()
            from megatron_selfdistill.commands.given_model import converted_beside

            others = [word for word in arguments.overrides if word not in named]
            config = configuration.load(others, arguments.config_name, arguments.config_dir)
            prechecks.require_data(config)
            checkpoint = converted_beside(Path(config.run_dir), Path(named[-1].removeprefix("model=")))
            arguments.overrides = [*others, f"checkpoint.load={checkpoint}"]
        config = configuration.load(arguments.overrides, arguments.config_name, arguments.config_dir)
        config = with_stored_tokenizer(config)
        if arguments.print:
            print(configuration.to_yaml(config))
            return 0
        given = configuration.GivenKeys(arguments.overrides, arguments.config_name, arguments.config_dir)
        if config.dry_run and config.cluster.num_gpus is not None and "RANK" not in os.environ:
            return int(door("plan").plan(config, given, arguments.argv))
        if arguments.ranks and "RANK" not in os.environ:
            check(config, arguments.ranks)
            return launch(arguments.ranks, arguments.argv)
        with stop.interruptible():
            status = train(config, given, ranks)
        if status == 0 and arguments.export and ranks.rank == 0 and not Path(config.run_dir, "stopped").exists():
            from megatron_selfdistill.commands.given_model import export

            print(f"exported: {export(Path(config.run_dir))}", flush=True)
        return status


def train(config: Config, given: Collection[str] | None = None, ranks: RollCall | None = None) -> int:
    """Check the configuration, build the trainer, run the loop, and return the exit status.

    0: the run is complete, or it stopped when asked; `EXIT_UNHEALTHY`: a guard stopped the run; `EXIT_NO_ROLLOUT`: an
    engine or code of the user failed.  In all three cases there is a checkpoint from which the run continues.
    ``given``: the keys that the user has set, which must not contradict the checkpoint that the run starts from; null
    means all keys that are not at their defaults.  ``ranks``: where the ranks of the launch meet; the caller reports an
    error there.
    Raises: `ConfigError` for bad input; what one rank can see alone is checked before the ranks meet.
    """
    ranks = ranks or RollCall()
    check(config, ranks.world_size)
    lock = RunLock(Path(config.run_dir))
    with stop.at_sudden_end(lock.release):
        try:
            if ranks.rank == 0 and not config.dry_run:
                lock.acquire()
            return _check_and_train(config, given, ranks, lock)
        finally:
            lock.release()


def check(config: Config, world_size: int) -> None:
    """Raise `ConfigError` or `CheckpointError` for what one process can see before ``world_size`` ranks start."""
    prechecks.require_start(config)
    check_files(config)
    prechecks.require_ranks(config, world_size)
    prechecks.require_packages(config)
    prechecks.require_data(config)
    config.method.require_start(config)


def _check_and_train(config: Config, given: Collection[str] | None, ranks: RollCall, lock: RunLock) -> int:
    silence_known_warnings()
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.resumption import finished_run
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.evaluation import held_out, verify
    from megatron_selfdistill.teacher import Teachers

    as_given, config = config, with_stored_architecture(config, given)
    prechecks.require_packages(config)  # of the architecture that a checkpoint states
    require_same_tokenizer(config)
    teachers = Teachers.of(config)
    teachers.require(config)
    check_world(config, ranks.world_size, teaches_by_experts=teachers.has_experts(config))
    patience_s = config.parallel.distributed_timeout_minutes * 60
    finished = finished_run(config, as_given) if ranks.rank == 0 else None
    if checkpoint := ranks.answer("directory", str(finished or ""), patience_s):
        if ranks.rank == 0:
            from megatron_selfdistill.commands.announcement import complete

            print("\n".join(complete(config, config.num_steps, Path(checkpoint))), flush=True)
        return 0
    run_data = RunData.load(config)
    if config.evaluation.every or config.evaluation.at_start:
        verifier = verify.load_verifier(config.evaluation.verifier)
        held_out.checked_prompts(run_data, verifier, config.rollout.max_new_tokens)
    if ranks.answer("inputs", run_data.digest, patience_s) != run_data.digest:
        raise ConfigError(
            f"rank {ranks.rank} has read other problems or prompts than rank 0: all nodes need the same files at "
            "data.path, evaluation.path and data.tokenizer, and the same date"
        )
    return _train(config, run_data, None if config.dry_run else lock.renew, given)


def _train(
    config: Config, run_data: RunData, prove_ownership: Callable[[], None] | None, given: Collection[str] | None
) -> int:
    from megatron_selfdistill.commands.announcement import announce, conclude
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.metrics.guards import RunUnhealthy
    from megatron_selfdistill.trainer import Trainer

    grid = ranks.initialize(config.parallel, config.seed)
    try:
        stacks = Path(config.run_dir) / ("stacks_of_dry_run" if config.dry_run else "stacks")
        with watchdog.watched(
            grid.rank, grid.world_size, stacks, config.stop.hang_timeout_s(config.parallel.distributed_timeout_minutes)
        ):
            with signs_of_life.moving_files(), stop.failing_alone():
                trainer = Trainer(config, run_data, grid, prove_ownership)
                if config.metrics.num_explored or Path(config.run_dir, "explored").is_dir():
                    door("explorer").explore_run(trainer)
                report = door("report").report_run(trainer) if config.report.every != 0 else None
            try:
                announce(trainer, given)
                if not config.dry_run:
                    first, began = trainer.step, time.monotonic()
                    with stop.failing_alone(RunUnhealthy):
                        loop(trainer)
                    conclude(trainer, first, time.monotonic() - began, report and report.path)
                return 0
            except (RunUnhealthy, EngineError, VerifierError) as reason:  # every rank raises each of them
                if isinstance(reason, EngineError) and trainer.stop.agreed():
                    trainer.leave()  # the end of the job has also ended its servers
                    return 0
                trainer.save()
                events = {RunUnhealthy: "guard", EngineError: "engine", VerifierError: "verifier"}
                event = next(name for kind, name in events.items() if isinstance(reason, kind))
                trainer.events.record(trainer.step, event, reason=str(reason))
                trainer.log.message(f"stopped: {reason}")
                return EXIT_UNHEALTHY if isinstance(reason, RunUnhealthy) else EXIT_NO_ROLLOUT
            finally:
                trainer.close()
                if report is not None and trainer.run_directory.is_owned:
                    report.finish()
    finally:
        ranks.shutdown()


if __name__ == "__main__":
    stop.ignore_signals()  # but not in main: torchrun ends all ranks after one of them, and each has a status to keep
    sys.exit(main())
