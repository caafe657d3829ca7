# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Sample solutions from a model, verify them against the answers, and write the best ones as JSONL.

    selfdistill solutions --out own.jsonl --hf /models/Qwen3-8B data.path=problems.jsonl rollout.max_new_tokens=4096
    selfdistill solutions --out own.jsonl checkpoint.load=runs/first/checkpoints data.path=problems.jsonl \
        data.tokenizer=/models/Qwen3-8B evaluation.verifier=math_verify --num-samples 16 --keep 2 --pick learnable
    torchrun --nproc-per-node 8 -m megatron_selfdistill solutions --out own.jsonl ...
    selfdistill data.path=own.jsonl ...

The settings are the keys of `selfdistill`: model, layout, data, rollout (the sampler and its parameters), the verifier,
and for --pick learnable the loss's backend (loss.backend, loss.fused).  A problem needs an answer and no solution.  The
file appears when all problems are done.  Meanwhile and afterwards, own.attempts.jsonl records the result of each
problem, so that the same command continues after a kill.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_selfdistill.choices import SOLUTION_RANKINGS
from megatron_selfdistill.config.methods import settings_of
from megatron_selfdistill.methods.data_sets.data_set_command import configured, parser_of, run_command

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.methods.data_sets.data_set_job import DataSetWork


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_intermixed_args(argv)

    def with_settings(config: Config) -> Config:
        named = {name: getattr(arguments, name) for name in ("num_samples", "keep", "pick", "alpha", "ratio_weight")}
        return replace(config, method=settings_of({"name": "own_solutions", **named}))

    def work(config: Config, run_data: RunData, grid: RankGrid) -> DataSetWork:
        from megatron_selfdistill.methods.data_sets.data_set_job import SolutionWork
        from megatron_selfdistill.methods.own_solutions import OwnSolutionsSettings

        assert isinstance(config.method, OwnSolutionsSettings)
        return SolutionWork(config, run_data, grid, arguments.hf, config.method)

    return run_command("solutions", arguments, lambda: configured(arguments), work, with_settings)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("solutions", __doc__, wanted="solutions", num_samples=8)
    option = parser.add_argument
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
    return parser
