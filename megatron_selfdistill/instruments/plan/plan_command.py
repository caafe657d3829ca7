# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Show what a run will need on its GPUs, and how to launch it, before there is a GPU.

    selfdistill plan recipe=qwen3_8b data.global_batch_size=64
    selfdistill plan cluster.num_gpus=16 checkpoint.load=DIR data.path=problems.jsonl data.tokenizer=DIR

The plan shows the layout, the memory of each stage, the pipeline's idle time, the optional packages that the run needs,
and the commands that launch the run.  A plan needs cluster.num_gpus, which many recipes set.  `selfdistill dry_run=true
...` without torchrun does the same; under torchrun, dry_run=true builds everything on the GPUs and stops.

exit status: 0 for a plan that fits; 2 with one message for a plan that cannot run or does not fit
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence

from megatron_selfdistill import config as configuration
from megatron_selfdistill.checkpoint.vocabulary import with_stored_tokenizer
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.command_line import with_files
from megatron_selfdistill.distributed.terminal import print_error, silence_known_warnings
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.instruments.plan.planned_gpus import planned_gpus


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of the run that ``argv`` configures.

    Returns 0; 2 after one message on standard error for bad input and for a run that does not fit; 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_intermixed_args(argv)
    try:
        if "RANK" in os.environ:
            raise ConfigError("a plan is made by one process: start it without torchrun, or train with dry_run=true")
        named = (["dry_run=true", *with_files(arguments.overrides)], arguments.config_name, arguments.config_dir)
        config = configuration.load(*named)
        return plan(config, configuration.GivenKeys(*named), argv)
    except (ConfigError, CheckpointError) as error:
        print_error("plan:", error)
        return 2
    except KeyboardInterrupt:
        return 130


def plan(config: Config, given: Collection[str] | None, arguments: Sequence[str]) -> int:
    """Print what the run will need on ``cluster.num_gpus`` GPUs, and how to launch it.

    This is ``dry_run=true`` without a launch.  Returns the exit status 0.
    Raises: `ConfigError` for a configuration that cannot run, and after the tables for one that does not fit.
    """
    config = with_stored_tokenizer(config)
    prechecks.require_ranks(config, planned_gpus(config))
    if config.data.path and config.data.tokenizer:  # else the plan reads neither
        prechecks.require_data(config)
    prechecks.require_start(config)
    silence_known_warnings()
    from megatron_selfdistill.instruments.plan.dry_run import dry_run
    from megatron_selfdistill.instruments.plan.plan_tables import show

    planned = dry_run(config, given)
    show(planned, arguments)
    misfit = planned.misfit()
    if misfit is not None:
        raise ConfigError(misfit)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of `selfdistill train`, or FILE.yaml")
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a directory with further configuration groups"
    )
    return parser
