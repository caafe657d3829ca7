# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command lines of `selfdistill solutions` and `selfdistill explanations`, which write a data set with a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill.commands.model_command import ended
from megatron_selfdistill.config.command_line import at_least_1, with_files
from megatron_selfdistill.config.world_checks import check_world

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.methods.data_sets.data_set_job import DataSetWork

MakeWork = Callable[["Config", "RunData", "RankGrid"], "DataSetWork"]
"""A function that returns the work of a command for its configuration, on this rank."""


def run_command(
    name: str,
    arguments: argparse.Namespace,
    config: Callable[[], Config],
    make_work: MakeWork,
    completed: Callable[[Config], Config] = lambda config: config,
) -> int:
    """Check the command line, write the data set on every rank, and return the exit status.

    The status is 0, or that of `ended` after a message.  ``name``: the name of the command in messages.
    ``config``: the function that returns the `configured` keys of the command line; it raises `ConfigError`.
    ``completed``: a function that adds what needs torch.
    """
    from megatron_selfdistill.errors import ConfigError

    def work() -> int:
        if arguments.out.is_dir():
            raise ConfigError(f"--out: expected a file, got the directory {arguments.out}")
        return make_data_set(arguments, completed(config()), make_work)

    return ended(name, work, "the same command continues from here")


def make_data_set(arguments: argparse.Namespace, config: Config, make_work: MakeWork) -> int:
    """Do the work and write the data set, on every rank; return the exit status."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.commands import given_model
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.interop.foreign_models import converted
    from megatron_selfdistill.methods.data_sets.data_set_job import write_data_set
    from megatron_selfdistill.methods.data_sets.solution_journal import file_beside

    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        hf = arguments.hf
        with converted(hf, file_beside(out, ".model")) if hf is not None else nullcontext() as checkpoint:
            model = {"format": "megatron", "path": str(checkpoint or config.checkpoint.load)}
            keys = configuration.GivenKeys(arguments.overrides, arguments.config_name)
            config = given_model.configured(config, keys, model)
            check_world(config, grid.world_size)
            write_data_set(out, arguments.group_size, make_work(config, RunData.load(config), grid))
        return 0
    finally:
        ranks.shutdown()


def configured(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the command line, before the model is known."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.checkpoint.vocabulary import with_stored_tokenizer
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.methods.data_sets.solution_journal import file_beside

    arguments.overrides = with_files(arguments.overrides)
    config = configuration.load(arguments.overrides, arguments.config_name)
    if arguments.num_problems is not None:
        config = replace(config, data=replace(config.data, limit=arguments.num_problems))
    if (arguments.hf is None) == (config.checkpoint.load is None):
        raise ConfigError("expected one model: either --hf DIR or checkpoint.load=DIR")
    if arguments.hf is not None and config.data.tokenizer is None:
        config = replace(config, data=replace(config.data, tokenizer=str(arguments.hf)))
    config = with_stored_tokenizer(config)
    # No run is resumed here: run_dir only holds the files that an engine needs beside the weights.
    checkpoint = replace(config.checkpoint, resume=False)
    return replace(config, checkpoint=checkpoint, run_dir=str(file_beside(arguments.out, ".engine")))


def parser_of(name: str, description: str | None, *, wanted: str, num_samples: int) -> argparse.ArgumentParser:
    """Return a parser with the options that both commands have.

    ``wanted``: what the command writes, in the plural; ``num_samples``: the default of --num-samples.
    """
    parser = argparse.ArgumentParser(
        prog=f"selfdistill {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("overrides", nargs="*", metavar="key=value", help="setting (`selfdistill --keys` lists them), or FILE.yaml")
    option(
        "--out", type=Path, required=True, metavar="FILE", help=f"JSONL file for the {wanted}, which data.path can read"
    )
    option("--hf", type=Path, metavar="DIR", help="Hugging Face directory of the model, instead of checkpoint.load")
    option(
        "--num-samples",
        type=at_least_1,
        default=num_samples,
        metavar="N",
        help=f"responses per problem (default: {num_samples})",
    )
    option("--keep", type=at_least_1, default=1, metavar="K", help=f"{wanted} per problem, at most (default: 1)")
    option("--num-problems", type=at_least_1, metavar="N", help="only the first N problems (default: all)")
    option("--group-size", type=at_least_1, default=64, metavar="N", help="number of problems at a time (default: 64)")
    option("--config-name", default="train", help="the primary configuration (default: train)")
    return parser
