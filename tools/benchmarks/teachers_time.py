# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the training of a step with teachers of their own weights, beside that of a step with the frozen start.

    python tools/benchmarks/teachers_time.py

All ways take turns on the same responses of a small random model, whose weights stay as they are.  A ratio is the
median, over the turns, of the ratio within one turn to the first way.  All teachers have the student's size.  The time
is that of the forward and backward passes of a step, with the swaps; on a CPU it is the processor's time, which depends
less on other work.

    the frozen start    no key teachers: one copy of the weights teaches and is the reference
    1 teacher           its weights stay on the device; teacher and reference are projected apart
    its own model       as for a teacher of another architecture: it reads in passes of its own, before the student
    N teachers          their weights are swapped in, one after the other, in every step, and their layers are fetched
                        beside the passes of the student
    nothing fetched     all weights are copied between these passes
    offloaded           teacher.offload=cpu: the weights of all leave the device between steps
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support"):
    sys.path.insert(0, str(_directory))

import torch  # noqa: E402
from measured_steps import measured_steps  # noqa: E402
from measuring_parser import measuring_parser  # noqa: E402
from step_parts import now, wait  # noqa: E402
from taught import write_records_of_teachers  # noqa: E402
from tiny_run import overrides, write_data  # noqa: E402

from megatron_selfdistill.teachers.teacher_copies import NamedTeachers  # noqa: E402

SKIPPED_STEPS = 2
NOTHING_FETCHED = "2 teachers, nothing fetched"


def main() -> None:
    """Run all ways in turn and print the table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        write_data(root / "data", num_problems=10 * arguments.problems)
        measured_steps(root / "start", [*_overrides(arguments, root), "num_steps=1", "checkpoint.save_every=1"], 0)
        ways = _ways(root)
        turns = [_turn(arguments, root / str(turn), root, ways) for turn in range(arguments.rounds)]
    baseline = next(iter(ways))
    print(
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, {arguments.problems} problems"
    )
    print("\n| way | forward and backward, s | ratio |\n|---|---|---|")
    for way in ways:
        ratio = statistics.median(turn[way] / turn[baseline] for turn in turns)
        print(f"| {way} | {statistics.median(turn[way] for turn in turns):.3f} | {ratio:.2f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "turns": turns}, indent=2))


def _ways(root: Path) -> dict[str, list[str]]:
    """Return the options of each way; ``root``: the directory with the data and the start."""
    ways: dict[str, list[str]] = {"the frozen start": []}
    for count in (1, 2, 4):
        names = [f"teacher_{number}" for number in range(count)]
        file = write_records_of_teachers(root / "data", names, f"{count}.jsonl")
        loads = [f"teachers.{name}.load={root}/start/checkpoints" for name in names]
        ways[f"{count} teacher{'s' * (count > 1)}"] = [f"data.path={file}", *loads]
    apart = "teachers.teacher_0.transformer={masked_softmax_fusion: false}"  # any field makes the model its own
    return ways | {
        "1 teacher, its own model": [*ways["1 teacher"], apart],
        NOTHING_FETCHED: ways["2 teachers"],
        "2 teachers, offloaded": [*ways["2 teachers"], "teacher.offload=cpu"],
    }


def _turn(arguments: argparse.Namespace, run_dir: Path, root: Path, ways: dict[str, list[str]]) -> dict[str, float]:
    """Return the median seconds of training per step of each way."""
    found = {}
    for number, (way, options) in enumerate(ways.items()):
        start = [*_overrides(arguments, root), f"checkpoint.load={root}/start/checkpoints", *options]
        fetches = mock.patch.object(NamedTeachers, "fetch") if way == NOTHING_FETCHED else nullcontext()
        with fetches, seconds_of_steps() as seconds:
            measured_steps(run_dir / str(number), start, SKIPPED_STEPS)
        found[way] = statistics.median(list(seconds.values())[SKIPPED_STEPS:])
    return found


@contextmanager
def seconds_of_steps() -> Iterator[dict[int, float]]:
    """Let the trainers of this context measure their forward and backward passes; yield the seconds by step."""
    from megatron_selfdistill.trainer import Trainer

    seconds: dict[int, float] = defaultdict(float)
    forward_backward = Trainer.forward_backward

    def timed(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        wait()
        began = now()
        output = forward_backward(trainer, *args, **kwargs)
        wait()
        seconds[trainer.step] += now() - began
        return output

    with mock.patch.object(Trainer, "forward_backward", timed):
        yield seconds


def _overrides(arguments: argparse.Namespace, root: Path) -> list[str]:
    return overrides(
        root / "data",
        root / "unused",
        f"data.global_batch_size={arguments.problems}",
        f"rollout.max_new_tokens={arguments.new_tokens}",
        f"num_steps={arguments.steps + SKIPPED_STEPS}",
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden}",
        f"model.vocab_size={arguments.vocab}",
        f"model.max_position_embeddings={arguments.new_tokens + 64}",
        f"schedule.max_tokens={arguments.tokens}",
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        "checkpoint.save_every=0",
        "metrics.show_samples=0",
        "metrics.teacher_every=1000",
    )


def _parser() -> argparse.ArgumentParser:
    sizes = {"problems": 32, "new-tokens": 64, "tokens": 512, "layers": 4, "hidden": 256, "vocab": 8192}
    return measuring_parser(__doc__, sizes | {"steps": 3, "rounds": 3})


if __name__ == "__main__":
    main()
