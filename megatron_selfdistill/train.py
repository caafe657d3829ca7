# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Train a Megatron model on its own responses, towards what it would have said had it known the solution.

selfdistill data.path=problems.jsonl data.tokenizer=DIR checkpoint.load=DIR run_dir=runs/first
torchrun --nproc-per-node 8 -m megatron_selfdistill.train parallel=node_of_8 ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill import config as configuration
from megatron_selfdistill import progress, stop
from megatron_selfdistill.checkpoint.errors import CheckpointError
from megatron_selfdistill.config import Config, ConfigError
from megatron_selfdistill.noise import silence_known_warnings
from megatron_selfdistill.rollout.errors import EngineError

if TYPE_CHECKING:
    from megatron_selfdistill.run import Run

EXIT_BAD_INPUT, EXIT_UNHEALTHY, EXIT_NO_ROLLOUT = 2, 3, 4


@stop.listening()
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 for a run that is complete or that stopped when asked (stop.py),
    2 for bad input, 3 where a guard stopped the run, 4 where responses could not be had.  A run that hangs exits with
    5 (progress.py)."""
    arguments = _parser().parse_args(argv)
    if arguments.keys:
        for key, (default, doc) in configuration.keys().items():
            print(f"{key}={default}\n    {doc}")
        return 0
    try:
        config = configuration.load(arguments.overrides, arguments.config_name, arguments.config_dir)
        if arguments.print:
            print(configuration.to_yaml(config))
            return 0
        given = configuration.given_keys(arguments.overrides, arguments.config_name, arguments.config_dir)
        if config.dry_run and config.cluster.num_gpus is not None and "RANK" not in os.environ:
            return plan(config, given, sys.argv[1:] if argv is None else argv)
        return train(config, given)
    except (ConfigError, CheckpointError, EngineError) as error:
        message = configuration.hidden(str(error))
        print(f"[rank {os.environ.get('RANK', '0')}] {message}", file=sys.stderr, flush=True)
        return EXIT_NO_ROLLOUT if isinstance(error, EngineError) else EXIT_BAD_INPUT


def train(config: Config, given: Collection[str] | None = None) -> int:
    """The whole run: check, build, loop.  Returns 0, also where the run was asked to stop, or, with a checkpoint to go
    on from, `EXIT_UNHEALTHY` where a guard stopped it and `EXIT_NO_ROLLOUT` where an engine failed.

    ``given``: the keys that somebody set, which must not contradict the checkpoint that the run starts from; null: all
    that are not at their defaults.
    Raises `ConfigError` for bad input: what can be seen without other ranks is seen before they are met.
    """
    silence_known_warnings()
    from megatron_selfdistill import parallel
    from megatron_selfdistill.checkpoint.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
    from megatron_selfdistill.guards import RunUnhealthy
    from megatron_selfdistill.inputs import Inputs
    from megatron_selfdistill.resuming import refuse_another_run, require_run_dir
    from megatron_selfdistill.run import Run

    require_run_dir(config)
    refuse_another_run(config, given)
    config = with_stored_architecture(config, given)
    require_same_tokenizer(config)
    config.check_world(parallel.world_size())
    inputs = Inputs.load(config)
    grid = parallel.initialize(config.parallel, config.seed)
    try:
        with progress.watched(grid.rank, grid.world_size, Path(config.run_dir) / "stacks", config.hang_timeout_s):
            with progress.moving_files():
                run = Run(config, inputs, grid)
            try:
                _announce(run)
                if not config.dry_run:
                    loop(run)
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
        parallel.shutdown()


def plan(config: Config, given: Collection[str] | None, arguments: Sequence[str]) -> int:
    """``dry_run=true`` without a launch: print what the run will need on ``cluster.num_gpus`` GPUs, and how to launch
    it.  Raises `ConfigError` for what cannot run, and after the tables for what does not fit."""
    silence_known_warnings()
    from megatron_selfdistill.plan.dry_run import dry_run
    from megatron_selfdistill.plan.report import show

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
    """Write the resolved configuration into the run folder and say what will run."""
    from megatron_selfdistill.logged import LEFT_OUT_FILE, list_left_out
    from megatron_selfdistill.model.architecture import uses_transformer_engine
    from megatron_selfdistill.model.build import megatron_in_use

    if not run.grid.is_reporter:
        return
    grid, counts = run.grid, run.inputs.counts
    folder = run.folder.path
    run.folder.write()
    layers = "Transformer Engine" if uses_transformer_engine() else "Megatron's local spec"
    vpp = f" (VPP {grid.virtual_pipeline_model_parallel_size})" if grid.virtual_pipeline_model_parallel_size else ""
    data = f"{len(run.inputs.problems)} {'turns' if run.inputs.about_conversations else 'problems'} "
    if run.config.logged:
        data += f"(what cannot be used is left out when it comes up, and listed in {folder / LEFT_OUT_FILE})"
    else:
        data += (
            f"({counts.truncated} with a shortened solution; left out: {counts.dropped} too long, "
            f"{run.inputs.problems.num_skipped} bad)"
        )
    start = run.config.checkpoint.load or "random weights"
    start = f"resumes {run.resumed_from}" if run.resumed_from else f"starts from {start}"
    for line in (
        f"{megatron_in_use()}; layers: {layers}; device: {grid.device.type}",
        f"TP {grid.tp_size} x PP {grid.pp_size}{vpp} x CP {grid.cp_size} x DP {grid.dp_size}, EP {grid.ep_size}; "
        f"pair order {run.pair_order}",
        *([f"loss: {run.loss_backend}"] if run.distils else []),
        f"{data}; contexts of at most {run.inputs.max_length} tokens",
        str(run.output_layer),
        *([run.inputs.about_prompts] if run.inputs.about_prompts else []),
        *run.inputs.about_conversations,
        f"{start}, at step {run.step} of {run.config.num_steps}; everything goes to {folder}",
        *([run.stop.plan] if run.stop.plan else []),
    ):
        run.log.message(line)
    if run.resumed_from is None:
        (folder / LEFT_OUT_FILE).unlink(missing_ok=True)
    if run.inputs.left_out:
        list_left_out(folder / LEFT_OUT_FILE, run.inputs.left_out)
        run.log.message(f"what was left out, by file and line: {folder / LEFT_OUT_FILE}; {run.inputs.left_out[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="hydra overrides, e.g. target=strict")
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder with further configuration groups")
    parser.add_argument("--keys", action="store_true", help="list every key with its default and meaning, and exit")
    parser.add_argument("--print", action="store_true", help="print the resolved configuration, and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
