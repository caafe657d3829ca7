# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the rollout of steps that wait for their longest responses, and of steps that continue these later.

    python tools/benchmarks/partial_time.py

A small random model ends its responses at random, so that their lengths have a long tail up to the limit.  The sampler
works in this process.  All ways take turns, so that other load on the machine affects all; the table has the means of
all steps but the first two, since steps with partial responses differ from each other by design.  A pass gives one
token to every response that is not finished.  Where a pass takes as long for few responses as for many, as on a GPU
whose passes read the weights, the rollout takes a time in proportion to its passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support"):
    sys.path.insert(0, str(_directory))

import torch  # noqa: E402
from measured_steps import measured_steps  # noqa: E402
from measuring_parser import measuring_parser  # noqa: E402
from tiny_run import overrides, write_data  # noqa: E402

COLUMNS = {
    "rollout": "seconds/rollout",
    "rounds": "rollout/rounds",
    "tokens per step": "tokens/rollout",
    "mean length": "response/length_mean",
    "age": "rollout/staleness_mean",
    "in several parts": "rollout/mixed_share",
}
SKIPPED_STEPS, WHOLE = 2, "whole responses"


def main() -> None:
    """Run all ways in turn and print the table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    batch = arguments.problems
    ways: dict[str, list[str]] = {WHOLE: []} | {
        f"{extra} problems more, max_staleness={staleness}": [
            f"rollout.extra_problems={extra}",
            f"rollout.max_staleness={staleness}",
        ]
        for extra, staleness in ((batch // 4, 1), (batch // 2, 2), (batch, 3))
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_data(root / "data", num_problems=10 * batch)
        for turn in range(arguments.rounds):
            for number, (way, more) in enumerate(ways.items()):
                run = [*_overrides(arguments, root), *more]
                found[way] += measured_steps(root / f"{number}-{turn}", run, SKIPPED_STEPS)
    _print(found, arguments.new_tokens // 8)


def _overrides(arguments: argparse.Namespace, root: Path) -> list[str]:
    return overrides(
        root / "data",
        root / "unused",
        f"data.global_batch_size={arguments.problems}",
        f"rollout.max_new_tokens={arguments.new_tokens}",
        f"num_steps={arguments.steps + SKIPPED_STEPS}",
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden}",
        f"model.max_position_embeddings={arguments.new_tokens + 64}",
        f"schedule.max_tokens={4 * arguments.new_tokens}",
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        "checkpoint.save_every=0",
        "metrics.show_samples=0",
    )


def _print(found: dict[str, list[dict[str, float]]], round_tokens: int) -> None:
    """Print the means of each way, and its passes and seconds per token relative to those of whole responses."""

    def mean(way: str, key: str) -> float:
        return statistics.mean(step.get(key, 0.0) for step in found[way])

    def passes(way: str) -> float:
        return round_tokens * mean(way, "rollout/rounds") or mean(way, "response/length_max")

    def relative(of: Callable[[str], float], way: str) -> float:
        """Return ``of(way)`` per token, divided by that of whole responses."""
        return of(way) / of(WHOLE) / (mean(way, "tokens/rollout") / mean(WHOLE, "tokens/rollout"))

    print(f"| way | {' | '.join(COLUMNS)} | passes | passes per token | seconds per token |")
    print(f"|---|{'---|' * len(COLUMNS)}---|---|---|")
    for way in found:
        cells = [f"{mean(way, key):.2f}" for key in COLUMNS.values()]
        ratios = [relative(passes, way), relative(lambda name: mean(name, "seconds/rollout"), way)]
        print(f"| {way} | {' | '.join(cells)} | {passes(way):.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def _parser() -> argparse.ArgumentParser:
    numbers = {"problems": 32, "new-tokens": 256, "layers": 4, "hidden": 128, "steps": 9, "rounds": 2}
    return measuring_parser(__doc__, numbers)


if __name__ == "__main__":
    main()
