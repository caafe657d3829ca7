# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Sample solutions from a model, verify them against the answers, and write the best ones as JSONL.

    selfdistill solutions --out own.jsonl --hf Qwen3-8B data.path=problems.jsonl rollout.max_new_tokens=4096
    selfdistill solutions --out own.jsonl checkpoint.load=runs/first/checkpoints data.path=problems.jsonl \
        data.tokenizer=Qwen3-8B evaluation.verifier=math_verify --num-samples 16 --keep 2 --pick learnable
    torchrun --nproc-per-node 8 -m megatron_selfdistill solutions --out own.jsonl ...
    selfdistill data.path=own.jsonl ...

The settings are the keys of `selfdistill`: model, layout, data, rollout (the sampler and its parameters), the verifier,
and for --pick learnable the loss's backend (loss.backend, loss.fused).  A problem needs an answer and no solution.  The
file appears when all problems are done.  Meanwhile and afterwards, own.attempts.jsonl records the result of each
problem, so that the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_selfdistill.choices import SOLUTION_RANKINGS
from megatron_selfdistill.config.world_checks import check_ranks, check_world

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config

EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_intermixed_args(argv)
    from megatron_selfdistill.compat.known_warnings import silence_known_warnings
    from megatron_selfdistill.errors import CheckpointError, ConfigError

    silence_known_warnings()
    try:
        check(arguments)
        return make_solutions(arguments)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"solutions: [rank {os.environ.get('RANK', '0')}] {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("solutions: interrupted; the same command continues from here", file=sys.stderr)
        return 130


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` or `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.distributed.roll_call import world_size

    config = _configured(arguments)
    if arguments.hf is not None:
        prechecks.require_hugging_face(arguments.hf)
    prechecks.require_data(config)
    prechecks.require_start(config)
    check_ranks(config, world_size())


def make_solutions(arguments: argparse.Namespace) -> int:
    """Find the solutions and write them, on every rank; return the exit status."""
    from megatron_selfdistill.commands.solution_job import SolutionJob
    from megatron_selfdistill.commands.solution_journal import file_beside
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import converted
    from megatron_selfdistill.run_data import RunData

    out = arguments.out
    config = _configured(arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        hf = arguments.hf
        with converted(hf, file_beside(out, ".model")) if hf is not None else nullcontext() as checkpoint:
            config = _of_checkpoint(config, arguments, checkpoint)
            check_world(config, grid.world_size)
            SolutionJob(config, RunData.load(config), grid, out, arguments.group_size, hf).run()
        return 0
    finally:
        ranks.shutdown()


def _configured(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the command line, before the model is known."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.commands.solution_journal import file_beside
    from megatron_selfdistill.errors import ConfigError

    config = configuration.load(["data.solutions=own", *arguments.overrides], arguments.config_name)
    named = {name: getattr(arguments, name) for name in ("num_samples", "keep", "pick", "alpha", "ratio_weight")}
    config = replace(config, solutions=replace(config.solutions, **named))
    if arguments.num_problems is not None:
        config = replace(config, data=replace(config.data, limit=arguments.num_problems))
    if (arguments.hf is None) == (config.checkpoint.load is None):
        raise ConfigError("expected one model: either --hf DIR or checkpoint.load=DIR")
    if arguments.hf is not None and config.data.tokenizer is None:
        config = replace(config, data=replace(config.data, tokenizer=str(arguments.hf)))
    # No run is resumed here: run_dir only holds the files that an engine needs beside the weights.
    checkpoint = replace(config.checkpoint, resume=False)
    return replace(config, checkpoint=checkpoint, run_dir=str(file_beside(arguments.out, ".engine")))


def _of_checkpoint(config: Config, arguments: argparse.Namespace, checkpoint: Path | None) -> Config:
    """Return ``config`` with the architecture of the model at ``checkpoint``; None is the model at checkpoint.load."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer

    if checkpoint is not None:
        config = replace(config, checkpoint=replace(config.checkpoint, load=str(checkpoint)))
    config = with_stored_architecture(config, configuration.given_keys(arguments.overrides, arguments.config_name))
    require_same_tokenizer(config)
    return config


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill solutions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "overrides", nargs="*", metavar="key=value", help="settings of selfdistill (`selfdistill --keys` lists them)"
    )
    option(
        "--out", type=Path, required=True, metavar="FILE", help="JSONL file for the solutions, which data.path can read"
    )
    option("--hf", type=Path, metavar="DIR", help="Hugging Face directory of the model, instead of checkpoint.load")
    option("--num-samples", type=_at_least_1, default=8, metavar="N", help="responses per problem (default: 8)")
    option("--keep", type=_at_least_1, default=1, metavar="K", help="solutions per problem, at most (default: 1)")
    option(
        "--pick",
        choices=SOLUTION_RANKINGS,
        default="shortest",
        help="which right solutions are kept (default: shortest)",
    )
    option("--alpha", type=float, default=0.01, help="with --pick learnable: weight of the worst token (default: 0.01)")
    option(
        "--ratio-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="with --pick learnable: weight of the divergence from the hinted model (default: 1)",
    )
    option("--num-problems", type=_at_least_1, metavar="N", help="only the first N problems (default: all)")
    option("--group-size", type=_at_least_1, default=64, metavar="N", help="number of problems at a time (default: 64)")
    option("--config-name", default="train", help="the primary configuration (default: train)")
    return parser
