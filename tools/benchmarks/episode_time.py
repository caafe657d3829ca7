# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a step with episodes of 10 and of 20 turns, turn by turn and as one sequence each.

    python tools/benchmarks/episode_time.py

All ways take turns in runs of a small random model, whose weights stay as they are.  Every response ends with its first
token, since each token is a stop token, and the environment replies with as many tokens as ``--reply`` says, so that
all episodes have the same length.  A ratio is that of 20 turns to 10.  The times are those of all calls of the sampler
and of the forward and backward passes of a step; on a CPU they are the processor's time, which depends less on other
work.  The tokens are those that training reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support", Path(__file__).parent):
    sys.path.insert(0, str(_directory))

import torch  # noqa: E402
from measured_steps import measured_steps  # noqa: E402
from measuring_parser import measuring_parser  # noqa: E402
from step_parts import now, wait  # noqa: E402
from tiny_run import overrides, write_data  # noqa: E402

from megatron_selfdistill.data.problems import Problem  # noqa: E402
from megatron_selfdistill.environments import Reply  # noqa: E402

SKIPPED_STEPS = 1
TURNS = (10, 20)
WAYS = {"turn by turn": "false", "one sequence": "true"}
COLUMNS = ("sampling, s", "training, s", "tokens")


class Talkative:
    """An environment that always replies, with a text of one length."""

    def __init__(self, length: int) -> None:
        self.text = "0" * length

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        """Return the text, whatever was said."""
        return Reply(self.text, done=False)


def main() -> None:
    """Run all ways in turn and print the table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        write_data(root / "data", num_problems=10 * arguments.problems)
        found = {
            f"{way}, {turns} turns": _medians(root, arguments, turns, switch)
            for way, switch in WAYS.items()
            for turns in TURNS
        }
    print(
        f"{arguments.layers} layers of {arguments.hidden}, {arguments.problems} episodes, replies of {arguments.reply}"
    )
    print(f"\n| way | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{values[column]:.4g}' for column in COLUMNS)} |")
    for way in WAYS:
        ten, twenty = (found[f"{way}, {turns} turns"] for turns in TURNS)
        print(f"| {way}, ratio | {' | '.join(f'{twenty[column] / ten[column]:.2f}' for column in COLUMNS)} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "found": found}, indent=2))


def _medians(root: Path, arguments: argparse.Namespace, turns: int, switch: str) -> dict[str, float]:
    """Return the medians of the columns over the steps of a run."""
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler
    from megatron_selfdistill.trainer import Trainer

    options = _overrides(arguments, root, turns, switch)
    with (
        seconds_by_step(MegatronSampler, "generate", "_version") as sampling,
        seconds_by_step(Trainer, "forward_backward", "step") as training,
    ):
        steps = measured_steps(root / f"{turns}_{switch}", options, SKIPPED_STEPS)
    values = (sampling.values(), training.values())
    medians = [statistics.median(list(seconds)[SKIPPED_STEPS:]) for seconds in values]
    return dict(zip(COLUMNS, [*medians, statistics.median(step["tokens/read"] for step in steps)], strict=True))


@contextmanager
def seconds_by_step(owner: type, name: str, step: str) -> Iterator[dict[int, float]]:
    """Measure the calls of a method within this context; yield the seconds by the attribute ``step`` of the object."""
    seconds: dict[int, float] = defaultdict(float)
    original = getattr(owner, name)

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait()
        began, number = now(), getattr(self, step)
        output = original(self, *args, **kwargs)
        wait()
        seconds[number] += now() - began
        return output

    with mock.patch.object(owner, name, timed):
        yield seconds


def _overrides(arguments: argparse.Namespace, root: Path, turns: int, switch: str) -> list[str]:
    longest = 64 + 20 * (arguments.reply + 2)
    return overrides(
        root / "data",
        root / "unused",
        "environment.name=episode_time.Talkative",
        f"environment.options.length={arguments.reply}",
        f"environment.max_turns={turns}",
        f"environment.limits={{one_sequence: {switch}}}",
        f"rollout.stop_token_ids={list(range(24))}",
        "rollout.max_new_tokens=1",
        f"data.global_batch_size={arguments.problems}",
        f"num_steps={arguments.steps + SKIPPED_STEPS}",
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden}",
        f"model.max_position_embeddings={longest}",
        f"schedule.max_tokens={longest}",
        "data.on_long_context=drop",
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        "checkpoint.save_every=0",
        "metrics.show_samples=0",
    )


def _parser() -> argparse.ArgumentParser:
    sizes = {"problems": 8, "reply": 24, "layers": 4, "hidden": 256, "steps": 3}
    return measuring_parser(__doc__, sizes)


if __name__ == "__main__":
    main()
